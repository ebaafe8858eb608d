use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use onebase_format::Digest;
use onebase_model::{Tenant, resident_bytes_of};

use crate::Error;
use crate::voice::{Facts, Voice};

/// A tenant that is to be served, as it outlives the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// The name it is asked by.
    pub name: String,
    /// The artifact's folder.
    pub source: PathBuf,
    /// The digest of the delta; `None` takes what is there.
    pub digest: Option<Digest>,
    /// Which loading of the tenant this is.
    pub generation: u64,
}

/// What a tenant's row in a list says.
#[derive(Clone, Debug)]
pub struct Listing {
    /// Name, folder, delta, generation.
    pub desired: Desired,
    /// What is known of the artifact; `None` where it could not be opened.
    pub facts: Option<Facts>,
    /// Bytes of memory, where it is in memory.
    pub resident_bytes: Option<usize>,
    /// Requests that are answered by it.
    pub n_uses: usize,
    /// Why it could not be loaded when that was last tried.
    pub failure: Option<Arc<Error>>,
    /// How often its weights were read.
    pub n_loads: u64,
    /// How often they were dropped to make room.
    pub n_evictions: u64,
    /// How long the last reading took.
    pub load_time: Duration,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) desired: Desired,
    pub(crate) facts: Option<Facts>,
    pub(crate) voice: Option<Arc<Voice>>,
    /// Its bytes when it was last in memory.
    pub(crate) bytes: Option<usize>,
    pub(crate) failure: Option<(Arc<Error>, Instant)>,
    /// Whether its delta was seen to change the output.
    pub(crate) is_tested: bool,
    pub(crate) last_used: u64,
    pub(crate) n_loads: u64,
    pub(crate) n_evictions: u64,
    pub(crate) load_time: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) entries: BTreeMap<String, Entry>,
    /// Generations that were replaced or unloaded while they answered.
    pub(crate) leaving: Vec<Weak<Voice>>,
    /// Tenants that a call is loading or unloading.
    pub(crate) changing: BTreeSet<String>,
    pub(crate) last_generation: u64,
    pub(crate) clock: u64,
}

impl State {
    pub(crate) fn resident_bytes(&self) -> usize {
        let resident = self.entries.values().filter_map(|entry| entry.voice.clone());
        let leaving = self.leaving.iter().filter_map(Weak::upgrade);
        let voices: Vec<Arc<Voice>> = resident.chain(leaving).collect();
        resident_bytes_of(voices.iter().filter_map(|voice| voice.weights()))
    }

    pub(crate) fn leave(&mut self, voice: Option<&Arc<Voice>>) {
        self.leaving.retain(|voice| voice.strong_count() > 0);
        self.leaving.extend(voice.map(Arc::downgrade));
    }

    /// Drops the least recently used voice that nobody uses.
    pub(crate) fn evict(&mut self) -> Option<Arc<Voice>> {
        let idle = |entry: &&mut Entry| entry.voice.as_ref().is_some_and(|v| !v.is_in_use());
        let entry = self.entries.values_mut().filter(idle).min_by_key(|entry| entry.last_used)?;
        entry.n_evictions += 1;
        entry.voice.take()
    }
}

impl Entry {
    pub(crate) fn new(desired: Desired, facts: Option<Facts>) -> Self {
        Self {
            desired,
            facts,
            voice: None,
            bytes: None,
            failure: None,
            is_tested: false,
            last_used: 0,
            n_loads: 0,
            n_evictions: 0,
            load_time: Duration::ZERO,
        }
    }

    pub(crate) fn place(&mut self, voice: Voice, facts: Facts, time: Duration) -> Arc<Voice> {
        let voice = Arc::new(voice);
        self.bytes = voice.weights().map(Tenant::resident_bytes);
        self.facts = Some(facts);
        self.failure = None;
        self.is_tested = true;
        self.n_loads += 1;
        self.load_time = time;
        self.voice = Some(Arc::clone(&voice));
        voice
    }

    pub(crate) fn listing(&self) -> Listing {
        let voice = self.voice.as_ref();
        Listing {
            desired: self.desired.clone(),
            facts: self.facts.clone(),
            resident_bytes: self.bytes.filter(|_| voice.is_some()),
            n_uses: voice.map_or(0, |voice| voice.uses.load(Ordering::Acquire)),
            failure: self.failure.as_ref().map(|(error, _)| Arc::clone(error)),
            n_loads: self.n_loads,
            n_evictions: self.n_evictions,
            load_time: self.load_time,
        }
    }
}
