use onebase_kernels::{add_assign, rms_norm, silu_mul};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

use crate::decoder::{Layer, Mlp};
use crate::linear::{RowGroup, SiteDelta, apply_all};
use crate::observer::{Nobody, Observer, SiteInput};
use crate::rope::rotate;
use crate::tenant::TableDelta;
use crate::{Error, KvCache, Model, ModelConfig, Result, Tenant};

mod attend;
mod layers;
mod moe;
mod rotated;

pub use layers::LayerRun;

/// Elements of a batch below which row operations stay on one thread.
const WORTH_A_THREAD: usize = 1 << 14;

/// Tokens of one sequence to run.
#[derive(Debug)]
pub struct Segment<'a> {
    /// The next tokens, any number.
    pub tokens: &'a [u32],
    /// Whose weights; `None` for the base's own.
    pub tenant: Option<&'a Tenant>,
    /// The sequence so far; the tokens are appended.
    pub cache: &'a mut KvCache,
    /// Which logits to compute.
    pub logits: Logits,
}

impl std::fmt::Debug for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tenant").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Which tokens of a segment get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: more of the prompt follows.
    None,
    /// The last one.
    Last,
    /// Every one.
    All,
}

/// A row of the batch.
#[derive(Clone, Copy)]
struct Row {
    segment: usize,
    position: usize,
    token: u32,
}

/// The rows of a batch, those of one tenant together.
struct Batch<'a> {
    rows: Vec<Row>,
    groups: Vec<RowGroup<'a>>,
}

impl<'a> Batch<'a> {
    fn new(segments: &[Segment<'a>]) -> Self {
        let mut tenants: Vec<Option<&Tenant>> = Vec::new();
        let same = |a: Option<&Tenant>, b: Option<&Tenant>| match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => std::ptr::eq(a, b),
            _ => false,
        };
        for segment in segments {
            if !tenants.iter().any(|t| same(*t, segment.tenant)) {
                tenants.push(segment.tenant);
            }
        }
        let mut batch = Self { rows: Vec::new(), groups: Vec::new() };
        for tenant in tenants {
            let first = batch.rows.len();
            for (index, segment) in segments.iter().enumerate() {
                if same(segment.tenant, tenant) {
                    let start = segment.cache.n_tokens();
                    batch.rows.extend(segment.tokens.iter().enumerate().map(|(i, token)| Row {
                        segment: index,
                        position: start + i,
                        token: *token,
                    }));
                }
            }
            batch.groups.push(RowGroup { rows: first..batch.rows.len(), tenant });
        }
        batch
    }
}

impl Model {
    /// Runs the tokens of every segment and appends them to its cache.
    ///
    /// Returns, for each segment, the logits asked for: `[n, vocab_size]` with
    /// its tenant's vocabulary. A segment's logits do not depend on the others,
    /// nor on how its tokens were split over calls, to the last bit.
    ///
    /// # Errors
    /// When a token is outside the vocabulary; nothing was run then.
    pub fn forward(&self, segments: &mut [Segment<'_>]) -> Result<Vec<Vec<f32>>> {
        self.forward_observed(segments, &mut Nobody)
    }

    /// [`Model::forward`], with the inputs of linear sites shown to `observer`.
    ///
    /// # Errors
    /// As there.
    pub fn forward_observed(
        &self,
        segments: &mut [Segment<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>> {
        self.check_vocabulary(segments)?;
        let batch = Batch::new(segments);
        if batch.rows.is_empty() {
            return Ok(vec![Vec::new(); segments.len()]);
        }
        let mut pass = Pass::new(self, batch);
        pass.embed();
        for (index, layer) in self.decoder.layers.iter().enumerate() {
            pass.attention(index, layer, segments, observer);
            pass.feed_forward(index, layer, observer);
        }
        for segment in segments.iter_mut() {
            segment.cache.advance(segment.tokens.len());
        }
        Ok(pass.logits(segments))
    }

    /// Checks that every token is one of its segment's vocabulary.
    fn check_vocabulary(&self, segments: &[Segment<'_>]) -> Result<()> {
        for segment in segments {
            let vocab_size = segment.tenant.map_or(&self.config, Tenant::config).vocab_size;
            if let Some(token) = segment.tokens.iter().find(|t| **t as usize >= vocab_size) {
                return Err(Error::Token { token: *token, vocab_size });
            }
        }
        Ok(())
    }
}

/// The forward pass of one batch and its buffers, each `[n_rows, width]`.
struct Pass<'m, 'a> {
    model: &'m Model,
    batch: Batch<'a>,
    /// The residual stream, `hidden_size` wide.
    stream: Vec<f32>,
    /// Input of the sites, `hidden_size` wide.
    x: Vec<f32>,
    /// Output of a block's last site, `hidden_size` wide.
    out: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Cosines and sines, `head_dim / 2` wide each.
    rotation: [Vec<f32>; 2],
}

/// `gate = silu(gate) · up`, on several threads where it is worth it.
fn gated(gate: &mut [f32], up: &[f32]) {
    if gate.len() < WORTH_A_THREAD {
        silu_mul(gate, up);
    } else {
        let chunks = gate.par_chunks_mut(WORTH_A_THREAD / 4);
        chunks.zip(up.par_chunks(WORTH_A_THREAD / 4)).for_each(|(gate, up)| silu_mul(gate, up));
    }
}

fn matrix(data: &[f32], n_rows: usize) -> MatrixRef<'_> {
    match MatrixRef::new(data, n_rows, data.len() / n_rows.max(1)) {
        Ok(matrix) => matrix,
        Err(_) => unreachable!("buffers hold whole rows"),
    }
}

fn matrix_mut(data: &mut [f32], n_rows: usize) -> MatrixMut<'_> {
    let width = data.len() / n_rows.max(1);
    match MatrixMut::new(data, n_rows, width) {
        Ok(matrix) => matrix,
        Err(_) => unreachable!("buffers hold whole rows"),
    }
}

impl<'m, 'a> Pass<'m, 'a> {
    fn new(model: &'m Model, batch: Batch<'a>) -> Self {
        let config = &model.config;
        let n = batch.rows.len();
        let q_size = config.n_heads * config.head_dim;
        let kv_size = config.n_kv_heads * config.head_dim;
        let half = config.head_dim / 2;
        let mut rotation = [vec![0.0; n * half], vec![0.0; n * half]];
        for group in &batch.groups {
            let rope = group.tenant.map_or(&model.rope, |t| &t.rope);
            for row in group.rows.clone() {
                let [cos, sin] = &mut rotation;
                let range = row * half..(row + 1) * half;
                let position = batch.rows[row].position;
                rope.write(position, &mut cos[range.clone()], &mut sin[range]);
            }
        }
        Self {
            model,
            stream: vec![0.0; n * config.hidden_size],
            x: vec![0.0; n * config.hidden_size],
            out: vec![0.0; n * config.hidden_size],
            q: vec![0.0; n * q_size],
            k: vec![0.0; n * kv_size],
            v: vec![0.0; n * kv_size],
            attended: vec![0.0; n * q_size],
            gate: vec![0.0; n * config.intermediate_size],
            up: vec![0.0; n * config.intermediate_size],
            rotation,
            batch,
        }
    }

    fn config_of(&self, group: &RowGroup<'a>) -> &ModelConfig {
        group.tenant.map_or(&self.model.config, |t| &t.config)
    }

    fn embed(&mut self) {
        let hidden = self.model.config.hidden_size;
        let base = &self.model.decoder.embedding;
        let base_rows = self.model.config.vocab_size;
        let mut change = vec![0.0; hidden];
        for group in &self.batch.groups {
            for row in group.rows.clone() {
                let token = self.batch.rows[row].token as usize;
                let out = &mut self.stream[row * hidden..(row + 1) * hidden];
                match group.tenant.map(|t| &t.decoder.embedding) {
                    None | Some(TableDelta::Unchanged) => base.widen_row(token, out),
                    Some(TableDelta::Exact(table)) => table.widen_row(token, out),
                    Some(TableDelta::Delta { added: Some(added), .. }) if token >= base_rows => {
                        added.widen_row(token - base_rows, out);
                    }
                    Some(TableDelta::Delta { delta, .. }) => {
                        base.widen_row(token, out);
                        delta.write_rows(token..token + 1, &mut change);
                        add_assign(out, &change);
                    }
                }
            }
        }
        self.rotate_stream();
    }

    /// Normalises `stream` into `x`, each row with its tenant's weight.
    fn norm(&mut self, base: &[f32], own: impl Fn(&'a Tenant) -> &'a Option<Vec<f32>>) {
        let hidden = self.model.config.hidden_size;
        for group in &self.batch.groups {
            let weight = group.tenant.and_then(|t| own(t).as_deref()).unwrap_or(base);
            let eps = self.config_of(group).norm_eps;
            let rows = group.rows.start * hidden..group.rows.end * hidden;
            let out = self.x[rows.clone()].chunks_exact_mut(hidden);
            for (x, out) in self.stream[rows].chunks_exact(hidden).zip(out) {
                rms_norm(x, weight, eps, out);
            }
        }
    }

    fn attention(
        &mut self,
        index: usize,
        layer: &Layer<crate::linear::Linear, Vec<f32>>,
        segments: &mut [Segment<'_>],
        observer: &mut dyn Observer,
    ) {
        let n = self.batch.rows.len();
        self.attention_input(index, layer);
        observer.observe(index, SiteInput::Attention, matrix(&self.x, n));
        self.heads(index, layer, segments, observer);
        let x = matrix(&self.attended, n);
        observer.observe(index, SiteInput::AttentionOutput, x);
        let (backend, groups) = (self.model.backend, &self.batch.groups);
        let site = |t: &'a Tenant| -> &'a SiteDelta { &t.decoder.layers[index].o };
        let inputs = self.model.inputs(SiteInput::AttentionOutput, x);
        apply_all(backend, groups, &inputs, [layer.o.to(&site, matrix_mut(&mut self.out, n))]);
        add_assign(&mut self.stream, &self.out);
    }

    /// Fills `x` with what the block's attention reads.
    fn attention_input(&mut self, index: usize, layer: &Layer<crate::linear::Linear, Vec<f32>>) {
        self.norm(&layer.input_norm, |t| &t.decoder.layers[index].input_norm);
    }

    /// Fills `attended` with the heads' outputs for the input `x`.
    fn heads(
        &mut self,
        index: usize,
        layer: &Layer<crate::linear::Linear, Vec<f32>>,
        segments: &mut [Segment<'_>],
        observer: &mut dyn Observer,
    ) {
        let n = self.batch.rows.len();
        let backend = self.model.backend;
        let site =
            |t: &'a Tenant| -> &'a Layer<SiteDelta, Option<Vec<f32>>> { &t.decoder.layers[index] };
        let groups = &self.batch.groups;
        let inputs = self.model.inputs(SiteInput::Attention, matrix(&self.x, n));
        apply_all(
            backend,
            groups,
            &inputs,
            [
                layer.q.to(&|t| &site(t).q, matrix_mut(&mut self.q, n)),
                layer.k.to(&|t| &site(t).k, matrix_mut(&mut self.k, n)),
                layer.v.to(&|t| &site(t).v, matrix_mut(&mut self.v, n)),
            ],
        );
        if let Some(weights) = &layer.qk_norm {
            self.norm_heads(weights, |t| &site(t).qk_norm);
        }
        self.rotate();
        self.rotate_keys(index);
        let kv_size = self.k.len() / n.max(1);
        let (rows, k, v) = (&self.batch.rows, matrix(&self.k, n), matrix(&self.v, n));
        observer.observe_heads(index, k, v);
        for (row, (k, v)) in rows.iter().zip(k.data().chunks(kv_size).zip(v.data().chunks(kv_size)))
        {
            segments[row.segment].cache.write(index, row.position, k, v);
        }
        self.attend(index, segments);
        self.order_output();
    }

    /// Normalises every head of q and k with its tenant's weights.
    fn norm_heads(
        &mut self,
        base: &[Vec<f32>; 2],
        own: impl Fn(&'a Tenant) -> &'a Option<[Option<Vec<f32>>; 2]>,
    ) {
        let head_dim = self.model.config.head_dim;
        let mut normed = vec![0.0; head_dim];
        for group in &self.batch.groups {
            let eps = group.tenant.map_or(&self.model.config, |t| &t.config).norm_eps;
            for (which, heads) in [&mut self.q, &mut self.k].into_iter().enumerate() {
                let tenant = group.tenant.and_then(|t| own(t).as_ref());
                let weight = tenant.and_then(|w| w[which].as_deref()).unwrap_or(&base[which]);
                let width = heads.len() / self.batch.rows.len();
                let rows = group.rows.start * width..group.rows.end * width;
                for head in heads[rows].chunks_exact_mut(head_dim) {
                    rms_norm(head, weight, eps, &mut normed);
                    head.copy_from_slice(&normed);
                }
            }
        }
    }

    fn rotate(&mut self) {
        let head_dim = self.model.config.head_dim;
        let half = head_dim / 2;
        let [cos, sin] = &self.rotation;
        for heads in [&mut self.q, &mut self.k] {
            let width = heads.len() / self.batch.rows.len().max(1);
            let rotations = cos.chunks_exact(half).zip(sin.chunks_exact(half));
            for (row, (cos, sin)) in heads.chunks_exact_mut(width).zip(rotations) {
                row.chunks_exact_mut(head_dim).for_each(|head| rotate(head, cos, sin));
            }
        }
    }

    fn feed_forward(
        &mut self,
        index: usize,
        layer: &Layer<crate::linear::Linear, Vec<f32>>,
        observer: &mut dyn Observer,
    ) {
        let n = self.batch.rows.len();
        self.feed_forward_input(index, layer);
        if let Some(router) = &layer.router {
            self.experts(index, router, &layer.mlps, observer);
            return;
        }
        observer.observe(index, SiteInput::FeedForward, matrix(&self.x, n));
        self.gated(index, &layer.mlps[0]);
        let x = matrix(&self.gate, n);
        observer.observe(index, SiteInput::FeedForwardOutput, x);
        let (backend, groups) = (self.model.backend, &self.batch.groups);
        let site = |t: &'a Tenant| -> &'a SiteDelta { &t.decoder.layers[index].mlps[0].down };
        let down = layer.mlps[0].down.to(&site, matrix_mut(&mut self.out, n));
        let inputs = self.model.inputs(SiteInput::FeedForwardOutput, x);
        apply_all(backend, groups, &inputs, [down]);
        add_assign(&mut self.stream, &self.out);
    }

    /// Fills `x` with what the block's feed-forward part reads.
    fn feed_forward_input(&mut self, index: usize, layer: &Layer<crate::linear::Linear, Vec<f32>>) {
        self.norm(&layer.post_norm, |t| &t.decoder.layers[index].post_norm);
    }

    /// Fills `gate` with the gated activation for the input `x`, where all tokens have one
    /// network.
    fn gated(&mut self, index: usize, mlp: &Mlp<crate::linear::Linear>) {
        let n = self.batch.rows.len();
        let (backend, groups) = (self.model.backend, &self.batch.groups);
        let site = |t: &'a Tenant| -> &'a Mlp<SiteDelta> { &t.decoder.layers[index].mlps[0] };
        let inputs = self.model.inputs(SiteInput::FeedForward, matrix(&self.x, n));
        apply_all(
            backend,
            groups,
            &inputs,
            [
                mlp.gate.to(&|t| &site(t).gate, matrix_mut(&mut self.gate, n)),
                mlp.up.to(&|t| &site(t).up, matrix_mut(&mut self.up, n)),
            ],
        );
        gated(&mut self.gate, &self.up);
        if let Some(rotation) = &self.model.rotation {
            backend.hadamard_rows(&rotation.hadamard, &mut self.gate);
        }
    }

    fn logits(&mut self, segments: &[Segment<'_>]) -> Vec<Vec<f32>> {
        self.final_norm();
        let hidden = self.model.config.hidden_size;
        let kept = |row: &Row| match segments[row.segment].logits {
            Logits::None => false,
            Logits::All => true,
            Logits::Last => row.position + 1 == segments[row.segment].cache.n_tokens(),
        };
        let mut results = vec![Vec::new(); segments.len()];
        let mut x = Vec::new();
        let mut rows = Vec::new();
        let mut groups = Vec::new();
        // Rows with a head of their own come last: the base's is not theirs.
        let exact = |group: &RowGroup<'a>| {
            let table =
                group.tenant.map(|t| t.decoder.head.as_ref().unwrap_or(&t.decoder.embedding));
            matches!(table, Some(TableDelta::Exact(_)))
        };
        let (own, shared): (Vec<_>, Vec<_>) = self.batch.groups.iter().partition(|g| exact(g));
        let n_shared_groups = shared.len();
        let mut n_shared = 0;
        for (index, group) in shared.into_iter().chain(own).enumerate() {
            let first = rows.len();
            for row in group.rows.clone().filter(|row| kept(&self.batch.rows[*row])) {
                rows.push(self.batch.rows[row]);
                x.extend_from_slice(&self.x[row * hidden..(row + 1) * hidden]);
            }
            groups.push(RowGroup { rows: first..rows.len(), tenant: group.tenant });
            if index < n_shared_groups {
                n_shared = rows.len();
            }
        }
        if rows.is_empty() {
            return results;
        }
        let x = matrix(&x, rows.len());
        let decoder = &self.model.decoder;
        let base = decoder.head.as_ref().unwrap_or(&decoder.embedding);
        let base_rows = self.model.config.vocab_size;
        let backend = self.model.backend;
        let mut shared = vec![0.0; n_shared * base_rows];
        let mut shared_view = matrix_mut(&mut shared, n_shared);
        if n_shared > 0 {
            base.add_rows_to(backend, x.rows(0..n_shared), &mut shared_view);
        }
        for group in groups {
            let n = group.rows.len();
            if n == 0 {
                continue;
            }
            let x = x.rows(group.rows.clone());
            let table = group.tenant.map(|t| &t.decoder);
            let table = table.map(|d| d.head.as_ref().unwrap_or(&d.embedding));
            let vocab_size = self.config_of(&group).vocab_size;
            let mut past = Vec::new();
            match table {
                None | Some(TableDelta::Unchanged) => {}
                Some(TableDelta::Delta { delta, added }) => {
                    delta.add_to(backend, x, &mut shared_view.rows(group.rows.clone()));
                    if let Some(added) = added {
                        past = vec![0.0; n * (vocab_size - base_rows)];
                        backend.add_dense(added.as_ref(), x, &mut matrix_mut(&mut past, n));
                    }
                }
                Some(TableDelta::Exact(own)) => {
                    past = vec![0.0; n * vocab_size];
                    backend.add_dense(own.as_ref(), x, &mut matrix_mut(&mut past, n));
                }
            }
            for (i, row) in group.rows.clone().enumerate() {
                let result = &mut results[rows[row].segment];
                if row < n_shared {
                    result.extend_from_slice(shared_view.row(row));
                }
                let width = past.len() / n;
                result.extend_from_slice(&past[i * width..(i + 1) * width]);
            }
        }
        results
    }
}
