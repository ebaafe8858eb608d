use crate::ModelConfig;

/// Keys and values of one sequence: for each layer and key head, `[n, head_dim]`
/// in f32, growing with the sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    head_dim: usize,
    n_kv_heads: usize,
    n_tokens: usize,
    /// By layer, then head.
    heads: Vec<HeadCache>,
}

#[derive(Clone, Debug, Default)]
struct HeadCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for a model of this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            head_dim: config.head_dim,
            n_kv_heads: config.n_kv_heads,
            n_tokens: 0,
            heads: vec![HeadCache::default(); config.n_layers * config.n_kv_heads],
        }
    }

    /// Positions that were run.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Appends a position's keys and values, `[n_kv_heads, head_dim]` each.
    pub(crate) fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let heads = &mut self.heads[layer * self.n_kv_heads..(layer + 1) * self.n_kv_heads];
        let rows = keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim));
        for (head, (keys, values)) in heads.iter_mut().zip(rows) {
            head.keys.extend_from_slice(keys);
            head.values.extend_from_slice(values);
        }
    }

    /// Keys and values of positions `first..=last` of a head.
    pub(crate) fn window(
        &self,
        layer: usize,
        head: usize,
        first: usize,
        last: usize,
    ) -> (&[f32], &[f32]) {
        let cache = &self.heads[layer * self.n_kv_heads + head];
        let range = first * self.head_dim..(last + 1) * self.head_dim;
        (&cache.keys[range.clone()], &cache.values[range])
    }

    /// Counts positions whose keys and values every layer has appended.
    pub(crate) fn advance(&mut self, n_tokens: usize) {
        self.n_tokens += n_tokens;
    }
}
