//! Attention of a batch's rows over their sequences' caches.

use onebase_kernels::{Attention, PackedAttention};
use rayon::prelude::*;

use super::{Pass, Row, Segment, WORTH_A_THREAD};

/// Rows of a sequence that read packed keys and values together: each is expanded once for all.
const PACKED_ROWS: usize = 16;

/// Rows of one sequence, and the key head that they read.
struct Task {
    first_row: usize,
    n_rows: usize,
    kv_head: usize,
}

impl Pass<'_, '_> {
    /// Fills `attended` with the outputs of all heads.
    pub(super) fn attend(&mut self, layer: usize, segments: &[Segment<'_>]) {
        let config = &self.model.config;
        let windows: Vec<Option<usize>> = self
            .batch
            .groups
            .iter()
            .flat_map(|g| std::iter::repeat_n(self.config_of(g).windows[layer], g.rows.len()))
            .collect();
        if config.kv_format().is_some() {
            self.attend_packed(layer, segments, &windows);
            return;
        }
        let (head_dim, n_heads) = (config.head_dim, config.n_heads);
        let queries_per_key = n_heads / config.n_kv_heads;
        let scale = scale(head_dim);
        let (rows, q, backend) = (&self.batch.rows, &self.q, self.model.backend);
        let one = |scores: &mut Vec<f32>, (index, out): (usize, &mut [f32])| {
            let (row, head) = (index / n_heads, index % n_heads);
            let Row { segment, position, .. } = rows[row];
            let first = first_position(position, windows[row]);
            let cache = &segments[segment].cache;
            let window = cache.window(layer, head / queries_per_key, first, position);
            let Some(window) = window else { unreachable!("the cache is of f32") };
            let query = &q[index * head_dim..(index + 1) * head_dim];
            let (keys, values) = (&window.keys, &window.values);
            backend.attend(Attention { query, keys, values, scale }, scores, out);
        };
        let positions: usize = rows.iter().map(|r| r.position + 1).sum();
        if positions * n_heads * head_dim < WORTH_A_THREAD * 8 {
            let mut scores = Vec::new();
            let outs = self.attended.chunks_exact_mut(head_dim).enumerate();
            outs.for_each(|out| one(&mut scores, out));
        } else {
            let outs = self.attended.par_chunks_exact_mut(head_dim).enumerate();
            outs.for_each_init(Vec::new, one);
        }
    }

    fn attend_packed(&mut self, layer: usize, segments: &[Segment<'_>], windows: &[Option<usize>]) {
        let config = &self.model.config;
        let (head_dim, n_heads) = (config.head_dim, config.n_heads);
        let group = n_heads / config.n_kv_heads;
        let tasks = self.packed_tasks();
        let (rows, q, backend) = (&self.batch.rows, &self.q, self.model.backend);
        let outs: Vec<Vec<f32>> = tasks
            .par_iter()
            .map_init(Vec::new, |scratch, task| {
                let own = &rows[task.first_row..task.first_row + task.n_rows];
                let (mut queries, mut firsts, mut limits) = (Vec::new(), Vec::new(), Vec::new());
                let from = |index: usize| {
                    first_position(own[index].position, windows[task.first_row + index])
                };
                let first = (0..own.len()).map(from).min().unwrap_or(0);
                for (index, row) in own.iter().enumerate() {
                    let at = ((task.first_row + index) * n_heads + task.kv_head * group) * head_dim;
                    queries.extend_from_slice(&q[at..at + group * head_dim]);
                    firsts.extend(std::iter::repeat_n(from(index) - first, group));
                    limits.extend(std::iter::repeat_n(row.position + 1 - first, group));
                }
                let last = own.iter().map(|row| row.position).max().unwrap_or(0);
                let cache = &segments[own[0].segment].cache;
                let window = cache.packed_window(layer, task.kv_head, first, last);
                let Some((format, window)) = window else { unreachable!("the cache is packed") };
                let attention = PackedAttention {
                    queries: &queries,
                    firsts: &firsts,
                    limits: &limits,
                    keys: &window.keys,
                    values: &window.values,
                    format,
                    scale: scale(head_dim),
                };
                let mut out = vec![0.0; queries.len()];
                backend.attend_packed(attention, scratch, &mut out);
                out
            })
            .collect();
        for (task, out) in tasks.iter().zip(outs) {
            for (index, out) in out.chunks_exact(group * head_dim).enumerate() {
                let at = ((task.first_row + index) * n_heads + task.kv_head * group) * head_dim;
                self.attended[at..at + group * head_dim].copy_from_slice(out);
            }
        }
    }

    /// Rows of each sequence, a few at a time, with each key head.
    fn packed_tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        let mut first_row = 0;
        for own in self.batch.rows.chunk_by(|a, b| a.segment == b.segment) {
            for own in own.chunks(PACKED_ROWS) {
                let n_rows = own.len();
                tasks.extend((0..self.model.config.n_kv_heads).map(|kv_head| Task {
                    first_row,
                    n_rows,
                    kv_head,
                }));
                first_row += n_rows;
            }
        }
        tasks
    }
}

/// The first position that a row at `position` sees.
fn first_position(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// The factor on scores.
fn scale(head_dim: usize) -> f32 {
    #[allow(clippy::cast_precision_loss)]
    let head_dim = head_dim as f32;
    1.0 / head_dim.sqrt()
}
