use onebase_format::Digest;
use onebase_model::KvCache;

use crate::voice::Voice;

/// Fewest tokens in common that are worth taking over.
const LEAST_TOKENS: usize = 8;

/// Whose keys and values they are: of another delta, or another loading of the same, they are
/// never used.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    name: String,
    digest: Digest,
    generation: u64,
}

impl Key {
    fn of(voice: &Voice) -> Self {
        let (digest, generation) = (voice.digest(), voice.generation());
        Self { name: voice.name().to_owned(), digest, generation }
    }
}

#[derive(Debug)]
struct Entry {
    key: Key,
    tokens: Vec<u32>,
    cache: KvCache,
    last_used: u64,
}

/// Keys and values of sequences that have ended, for those that begin alike.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    entries: Vec<Entry>,
    clock: u64,
    n_tokens: usize,
}

impl PrefixCache {
    /// Positions held, whole pages each.
    pub(crate) fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Keys and values of the longest beginning of `tokens` that there is, never of all: the
    /// last one is run for its logits.
    pub(crate) fn find(&mut self, voice: &Voice, tokens: &[u32]) -> Option<KvCache> {
        let key = Key::of(voice);
        let most = tokens.len().saturating_sub(1);
        let common = |entry: &Entry| {
            let same = entry.tokens.iter().zip(&tokens[..most]).take_while(|(a, b)| a == b);
            same.count()
        };
        let own = self.entries.iter_mut().filter(|entry| entry.key == key);
        let (n, entry) = own.map(|entry| (common(entry), entry)).max_by_key(|(n, _)| *n)?;
        if n < LEAST_TOKENS {
            return None;
        }
        self.clock += 1;
        entry.last_used = self.clock;
        Some(entry.cache.prefix(n))
    }

    /// Keeps a sequence's keys and values; `tokens` are those that were run.
    pub(crate) fn keep(&mut self, voice: &Voice, tokens: &[u32], cache: KvCache) {
        let tokens = &tokens[..cache.n_tokens().min(tokens.len())];
        if tokens.len() < LEAST_TOKENS {
            return;
        }
        let key = Key::of(voice);
        let longer = |e: &Entry| e.key == key && e.tokens.starts_with(tokens);
        if self.entries.iter().any(longer) {
            return;
        }
        // What the new one begins with needs no entry of its own.
        self.entries.retain(|e| e.key != key || !tokens.starts_with(&e.tokens));
        self.clock += 1;
        let (tokens, last_used) = (tokens.to_vec(), self.clock);
        self.entries.push(Entry { key, tokens, cache, last_used });
        self.count();
    }

    /// Drops the least recently used; `false` when there is none.
    pub(crate) fn evict(&mut self) -> bool {
        let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.last_used);
        let Some((index, _)) = oldest else { return false };
        self.entries.swap_remove(index);
        self.count();
        true
    }

    /// Drops those of generations that nobody can ask for any more.
    pub(crate) fn retain(&mut self, is_served: impl Fn(&str, u64) -> bool) {
        self.entries.retain(|entry| is_served(&entry.key.name, entry.key.generation));
        self.count();
    }

    fn count(&mut self) {
        self.n_tokens = self.entries.iter().map(|entry| pages(entry.tokens.len())).sum();
    }
}

/// Positions of a page of keys and values, which is what memory is given out by.
const PAGE_TOKENS: usize = 32;

/// Positions that a sequence of so many tokens takes up.
pub(crate) fn pages(n_tokens: usize) -> usize {
    n_tokens.next_multiple_of(PAGE_TOKENS)
}

/// Positions of the pages that fit into as many.
pub(crate) fn whole_pages(n_tokens: usize) -> usize {
    n_tokens / PAGE_TOKENS * PAGE_TOKENS
}
