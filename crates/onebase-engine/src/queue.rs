use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::sequence::{RequestId, Sequence};

/// How much more a token of an answer counts than one of a prompt, which is run with others.
const NEW_TOKEN_WEIGHT: f64 = 2.0;

/// Requests that wait, and whose turn it is: the tenant's that was served least.
///
/// Service is counted in tokens, and a tenant that comes back from a pause starts where the
/// least served of the others is: it cannot save up, and nobody waits for its past (the virtual
/// token counter of "Fairness in Serving Large Language Models", arXiv 2401.00588, section 4).
#[derive(Default)]
pub(crate) struct FairQueue {
    waiting: BTreeMap<String, VecDeque<Sequence>>,
    service: BTreeMap<String, f64>,
    n_waiting: usize,
}

impl FairQueue {
    pub(crate) fn len(&self) -> usize {
        self.n_waiting
    }

    /// Requests that wait, by tenant.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = (&str, usize)> {
        self.waiting.iter().map(|(name, waiting)| (name.as_str(), waiting.len()))
    }

    /// Adds a request; `running` are the tenants that are being served.
    pub(crate) fn push(&mut self, sequence: Sequence, running: &BTreeSet<&str>) {
        let name = sequence.tenant().to_owned();
        self.enter(&name, running);
        self.waiting.entry(name).or_default().push_back(sequence);
        self.n_waiting += 1;
    }

    /// Puts a request back before all others of its tenant.
    pub(crate) fn put_back(&mut self, sequence: Sequence) {
        let name = sequence.tenant().to_owned();
        self.waiting.entry(name).or_default().push_front(sequence);
        self.n_waiting += 1;
    }

    /// Lifts the service of a tenant that was away to the least of those who are there.
    fn enter(&mut self, name: &str, running: &BTreeSet<&str>) {
        let is_there = |other: &str| self.waiting.contains_key(other) || running.contains(other);
        if is_there(name) {
            return;
        }
        let others = self.service.iter().filter(|(other, _)| is_there(other));
        let least = others.map(|(_, service)| *service).min_by(f64::total_cmp);
        // Where nobody is there, all that was is forgotten.
        let Some(least) = least else {
            self.service.clear();
            self.service.insert(name.to_owned(), 0.0);
            return;
        };
        let service = self.service.entry(name.to_owned()).or_insert(least);
        *service = service.max(least);
    }

    /// Counts tokens that were run for a tenant.
    pub(crate) fn serve(&mut self, name: &str, n_prompt: usize, n_new: usize) {
        #[allow(clippy::cast_precision_loss)]
        let tokens = n_prompt as f64 + NEW_TOKEN_WEIGHT * n_new as f64;
        *self.service.entry(name.to_owned()).or_default() += tokens;
    }

    pub(crate) fn service(&self, name: &str) -> f64 {
        self.service.get(name).copied().unwrap_or_default()
    }

    fn next_name(&self) -> Option<String> {
        let by_service =
            |a: &&String, b: &&String| self.service(a).total_cmp(&self.service(b)).then(a.cmp(b));
        self.waiting.keys().min_by(by_service).cloned()
    }

    /// The request whose turn it is.
    pub(crate) fn peek(&self) -> Option<&Sequence> {
        self.waiting.get(&self.next_name()?)?.front()
    }

    /// Takes it.
    pub(crate) fn pop(&mut self) -> Option<Sequence> {
        let name = self.next_name()?;
        let waiting = self.waiting.get_mut(&name)?;
        let sequence = waiting.pop_front()?;
        self.n_waiting -= 1;
        if waiting.is_empty() {
            self.waiting.remove(&name);
        }
        Some(sequence)
    }

    /// The newest request of the tenant with most of them, where that has at least two more
    /// than `name`: who fills the queue is the one who is turned away.
    pub(crate) fn displace(&mut self, name: &str) -> Option<Sequence> {
        let own = self.waiting.get(name).map_or(0, VecDeque::len);
        let (_, most) = self.waiting.iter_mut().max_by_key(|(_, waiting)| waiting.len())?;
        if most.len() < own + 2 || most.back().is_some_and(Sequence::is_started) {
            return None;
        }
        self.n_waiting -= 1;
        most.pop_back()
    }

    /// Takes out the requests for which `is_meant` holds.
    pub(crate) fn take(&mut self, is_meant: impl Fn(&Sequence) -> bool) -> Vec<Sequence> {
        let mut taken = Vec::new();
        for waiting in self.waiting.values_mut() {
            let (out, stay) = waiting.drain(..).partition(&is_meant);
            *waiting = stay;
            let out: VecDeque<Sequence> = out;
            taken.extend(out);
        }
        self.waiting.retain(|_, waiting| !waiting.is_empty());
        self.n_waiting -= taken.len();
        taken
    }

    pub(crate) fn take_one(&mut self, id: RequestId) -> Option<Sequence> {
        self.take(|sequence| sequence.id == id).pop()
    }
}
