use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use onebase_format::artifact::{Artifact, digest_of_tensors};
use onebase_model::{Model, Tenant, TextModel};
use rayon::ThreadPool;

use crate::entries::{Desired, Entry, Listing, State};
use crate::names::{check_name, nearest};
use crate::voice::{Facts, Probe, Voice};
use crate::{Error, Result};

/// How long a tenant that could not be loaded is not tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// How often a load that waits for memory looks again, should no request wake it.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The tenants: which there are, and which of them are in memory.
///
/// A load makes a new generation under a name; requests hold a [`Lease`] on the generation
/// that they started with, and end with it. A generation's weights may leave the memory when
/// no request holds it, and are read again, compared with its digest, when one comes.
pub struct Registry {
    model: Arc<Model>,
    base: Arc<Voice>,
    probe: Probe,
    limit_bytes: usize,
    /// Reads and prepares; a pool apart, so that no step waits for it.
    pool: ThreadPool,
    state: Mutex<State>,
    released: Condvar,
    /// One load at a time.
    loading: Mutex<()>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("state", &*self.state()).finish_non_exhaustive()
    }
}

/// The right to answer with a generation, which stays in memory for it.
#[derive(Debug)]
pub struct Lease {
    voice: Arc<Voice>,
    registry: Weak<Registry>,
}

impl std::ops::Deref for Lease {
    type Target = Voice;

    fn deref(&self) -> &Voice {
        &self.voice
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        self.voice.uses.fetch_add(1, Ordering::AcqRel);
        Self { voice: Arc::clone(&self.voice), registry: Weak::clone(&self.registry) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.voice.uses.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(registry) = self.registry.upgrade()
        {
            registry.released.notify_all();
        }
    }
}

/// The mark that a call changes a tenant.
struct Changing<'a> {
    registry: &'a Registry,
    name: &'a str,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.registry.state().changing.remove(self.name);
    }
}

impl Registry {
    /// The tenants of a base, none yet; `limit_bytes` is what all in memory may take together.
    ///
    /// # Errors
    /// When the base has no tokenizer, cannot be read or does not run.
    pub fn new(model: Arc<Model>, base_name: &str, limit_bytes: usize) -> Result<Arc<Self>> {
        check_name(base_name)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let pool = pool.map_err(|e| Error::Threads(Arc::new(e)))?;
        let digests = model.digests()?;
        let digest = digest_of_tensors(digests.own.iter().map(|(name, d)| (name.as_str(), *d)));
        let base = Arc::new(Voice::base(base_name.to_owned(), digest, &model)?);
        let probe = Probe::new(&model)?;
        Ok(Arc::new(Self {
            model,
            base,
            probe,
            limit_bytes,
            pool,
            state: Mutex::default(),
            released: Condvar::new(),
            loading: Mutex::new(()),
        }))
    }

    /// The base.
    pub fn base(&self) -> &Arc<Voice> {
        &self.base
    }

    /// What all tenants in memory may take together.
    pub fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All tenants, by name.
    pub fn list(&self) -> Vec<Listing> {
        self.state().entries.values().map(Entry::listing).collect()
    }

    /// A tenant.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn listing(&self, name: &str) -> Result<Listing> {
        let state = self.state();
        let entry = state.entries.get(name).ok_or_else(|| self.unknown(&state, name))?;
        Ok(entry.listing())
    }

    fn unknown(&self, state: &State, name: &str) -> Error {
        let known = state.entries.keys().map(String::as_str).chain([self.base.name()]);
        Error::UnknownTenant { name: name.to_owned(), nearest: nearest(name, known) }
    }

    /// Bytes of all tenants in memory, what they share counted once.
    pub fn resident_bytes(&self) -> usize {
        self.state().resident_bytes()
    }

    /// The right to answer as `name`; its weights are read if they are not in memory.
    ///
    /// # Errors
    /// When there is no such tenant, it cannot be loaded, or there is no memory for it until
    /// `until`.
    pub fn lease(self: &Arc<Self>, name: &str, until: Instant) -> Result<Lease> {
        if let Some(lease) = self.resident(name)? {
            return Ok(lease);
        }
        let _turn = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(lease) = self.resident(name)? {
                return Ok(lease);
            }
            let (desired, is_tested) = {
                let state = self.state();
                let entry = state.entries.get(name).ok_or_else(|| self.unknown(&state, name))?;
                (entry.desired.clone(), entry.is_tested)
            };
            let loaded = self.bring(&desired, is_tested, until);
            if let Some(lease) = self.settle(&desired, loaded)? {
                return Ok(lease);
            }
        }
    }

    /// [`Registry::lease`], if that takes no reading.
    ///
    /// # Errors
    /// When there is no such tenant, or it could not be loaded a moment ago.
    pub fn resident(self: &Arc<Self>, name: &str) -> Result<Option<Lease>> {
        if name == self.base.name() {
            return Ok(Some(self.lease_on(&self.base)));
        }
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let Some(entry) = state.entries.get_mut(name) else {
            return Err(self.unknown(&state, name));
        };
        entry.last_used = clock;
        if let Some(voice) = &entry.voice {
            return Ok(Some(self.lease_on(voice)));
        }
        match &entry.failure {
            Some((source, at)) if at.elapsed() < RETRY_AFTER => {
                let source = Arc::clone(source);
                Err(Error::TenantFailed { name: name.to_owned(), source })
            }
            _ => Ok(None),
        }
    }

    /// Called with the state locked, or for the base: nobody evicts it meanwhile.
    fn lease_on(self: &Arc<Self>, voice: &Arc<Voice>) -> Lease {
        voice.uses.fetch_add(1, Ordering::AcqRel);
        Lease { voice: Arc::clone(voice), registry: Arc::downgrade(self) }
    }

    /// Puts what was loaded in its place, or the reason why not; `None` when another
    /// generation has taken the place meanwhile.
    fn settle(
        self: &Arc<Self>,
        desired: &Desired,
        loaded: Result<(Voice, Facts, Duration)>,
    ) -> Result<Option<Lease>> {
        let mut state = self.state();
        let entry = state.entries.get_mut(&desired.name);
        let entry = entry.filter(|entry| entry.desired.generation == desired.generation);
        let Some(entry) = entry else {
            return if state.entries.contains_key(&desired.name) {
                Ok(None)
            } else {
                Err(self.unknown(&state, &desired.name))
            };
        };
        match loaded {
            Ok((voice, facts, time)) => {
                entry.desired.digest = Some(voice.digest());
                let voice = entry.place(voice, facts, time);
                Ok(Some(self.lease_on(&voice)))
            }
            Err(error @ (Error::NoRoom { .. } | Error::TooLarge { .. })) => Err(error),
            Err(error) => {
                let source = Arc::new(error);
                entry.failure = Some((Arc::clone(&source), Instant::now()));
                Err(Error::TenantFailed { name: desired.name.clone(), source })
            }
        }
    }

    /// Reads a generation's weights into memory, after room was made for them.
    fn bring(
        &self,
        desired: &Desired,
        is_tested: bool,
        until: Instant,
    ) -> Result<(Voice, Facts, Duration)> {
        let start = Instant::now();
        let artifact = Artifact::open(&desired.source)?;
        let (expected, got) = (desired.digest, artifact.digest()?);
        if let Some(expected) = expected.filter(|expected| *expected != got) {
            return Err(Error::Changed { path: desired.source.clone(), expected, got });
        }
        let facts = Facts::of(&artifact);
        let name = &desired.name;
        let on_disk = usize::try_from(facts.sizes.total_bytes).unwrap_or(usize::MAX);
        let known = self.state().entries.get(name).and_then(|entry| entry.bytes);
        self.make_room(name, known.unwrap_or(on_disk), until)?;
        let voice = self.pool.install(|| -> Result<Voice> {
            let tenant = Tenant::load(&self.model, &artifact)?;
            if !is_tested {
                self.probe.check(&self.model, &tenant, desired.source.clone(), &facts)?;
            }
            let text = self.text(&artifact)?;
            Ok(Voice::tenant(name.clone(), desired.generation, got, tenant, text))
        })?;
        let bytes = voice.weights().map_or(0, Tenant::resident_bytes);
        self.make_room(name, bytes, until)?;
        Ok((voice, facts, start.elapsed()))
    }

    /// A tenant's text model, on a tokenizer that somebody has already where it is the same.
    fn text(&self, artifact: &Artifact) -> Result<TextModel> {
        let known = |digest| {
            let state = self.state();
            let voices = state.entries.values().filter_map(|entry| entry.voice.as_ref());
            let mut tokenizers = voices.chain([&self.base]).map(|voice| &voice.text().tokenizer);
            tokenizers.find(|tokenizer| tokenizer.digest() == digest).cloned()
        };
        let base = self.model.checkpoint();
        Ok(TextModel::from_artifact_with(artifact, base, &known)?)
    }

    /// Drops those that nobody uses, the least recently used first, until `bytes` more fit.
    fn make_room(&self, name: &str, bytes: usize, until: Instant) -> Result<()> {
        let limit = self.limit_bytes;
        if bytes > limit {
            return Err(Error::TooLarge { name: name.to_owned(), bytes, limit });
        }
        let mut state = self.state();
        // Freed when the state is free for others.
        let mut dropped = Vec::new();
        while state.resident_bytes().saturating_add(bytes) > limit {
            if let Some(voice) = state.evict() {
                dropped.push(voice);
                continue;
            }
            if Instant::now() >= until {
                return Err(Error::NoRoom { name: name.to_owned() });
            }
            let waited = self.released.wait_timeout(state, LOOK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        Ok(())
    }

    /// Loads an artifact under a name, as a new generation; `expected` is the generation that
    /// it replaces, 0 for none, `None` for whatever is there. Requests that are being answered
    /// keep theirs.
    ///
    /// # Errors
    /// When another call changes the tenant, its generation is another one, or the artifact is
    /// refused: the tenant is as it was then.
    pub fn load(
        &self,
        name: &str,
        source: &Path,
        expected: Option<u64>,
        until: Instant,
    ) -> Result<Listing> {
        check_name(name)?;
        if name == self.base.name() {
            let problem = "it is the base's";
            return Err(Error::BadName { name: name.to_owned(), problem });
        }
        let _changing = self.begin_change(name, expected)?;
        let generation = {
            let mut state = self.state();
            state.last_generation += 1;
            state.last_generation
        };
        let (name, source) = (name.to_owned(), source.to_owned());
        let mut desired = Desired { name, source, digest: None, generation };
        let turn = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let (voice, facts, time) = self.bring(&desired, false, until)?;
        desired.digest = Some(voice.digest());
        let mut state = self.state();
        let mut entry = Entry::new(desired.clone(), Some(facts.clone()));
        if let Some(old) = state.entries.remove(&desired.name) {
            (entry.n_loads, entry.n_evictions) = (old.n_loads, old.n_evictions);
            state.leave(old.voice.as_ref());
        }
        entry.place(voice, facts, time);
        state.clock += 1;
        entry.last_used = state.clock;
        let listing = entry.listing();
        state.entries.insert(desired.name, entry);
        drop((state, turn));
        Ok(listing)
    }

    /// Takes a tenant away, see [`Registry::load`] for `expected`. Requests that are being
    /// answered end as they would have.
    ///
    /// # Errors
    /// When there is no such tenant, another call changes it, or its generation is another one.
    pub fn unload(&self, name: &str, expected: Option<u64>) -> Result<()> {
        {
            let state = self.state();
            if !state.entries.contains_key(name) {
                return Err(self.unknown(&state, name));
            }
        }
        let _changing = self.begin_change(name, expected)?;
        let mut state = self.state();
        if let Some(old) = state.entries.remove(name) {
            state.leave(old.voice.as_ref());
        }
        Ok(())
    }

    fn begin_change<'a>(&'a self, name: &'a str, expected: Option<u64>) -> Result<Changing<'a>> {
        let mut state = self.state();
        let got = state.entries.get(name).map_or(0, |entry| entry.desired.generation);
        if let Some(expected) = expected.filter(|expected| *expected != got) {
            return Err(Error::Generation { name: name.to_owned(), expected, got });
        }
        if !state.changing.insert(name.to_owned()) {
            return Err(Error::Busy { name: name.to_owned() });
        }
        Ok(Changing { registry: self, name })
    }

    /// Takes up a tenant without reading its weights; it is tested when they are first read.
    /// One whose artifact cannot be opened, or is another than the desired one, is listed with
    /// the reason. A generation of 0 gets a new one.
    ///
    /// # Errors
    /// When no tenant can have the name, or one has it.
    pub fn restore(&self, mut desired: Desired) -> Result<()> {
        check_name(&desired.name)?;
        let opened = Artifact::open(&desired.source).map_err(Error::from);
        let opened = opened.and_then(|artifact| Ok((artifact.digest()?, Facts::of(&artifact))));
        let mut state = self.state();
        if desired.name == self.base.name() || state.entries.contains_key(&desired.name) {
            let problem = "it is taken";
            return Err(Error::BadName { name: desired.name, problem });
        }
        if desired.generation == 0 {
            desired.generation = state.last_generation + 1;
        }
        state.last_generation = state.last_generation.max(desired.generation);
        let path = desired.source.clone();
        let (facts, failure) = match opened {
            Ok((got, facts)) => match desired.digest.filter(|expected| *expected != got) {
                Some(expected) => (Some(facts), Some(Error::Changed { path, expected, got })),
                None => {
                    desired.digest = Some(got);
                    (Some(facts), None)
                }
            },
            Err(error) => (None, Some(error)),
        };
        let name = desired.name.clone();
        let mut entry = Entry::new(desired, facts);
        entry.failure = failure.map(|error| (Arc::new(error), Instant::now()));
        state.entries.insert(name, entry);
        Ok(())
    }

    /// Whether requests can still come for a generation.
    pub(crate) fn serves(&self, name: &str, generation: u64) -> bool {
        let entry = |state: &State| state.entries.get(name).map(|e| e.desired.generation);
        name == self.base.name() || entry(&self.state()) == Some(generation)
    }

    /// Continues to count generations after one that was given before.
    pub fn continue_after(&self, generation: u64) {
        let mut state = self.state();
        state.last_generation = state.last_generation.max(generation);
    }

    /// The newest generation that was given.
    pub fn last_generation(&self) -> u64 {
        self.state().last_generation
    }
}
