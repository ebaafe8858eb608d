use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use onebase_codec::{DeltaLinear, SecondMoment};
use onebase_format::Checkpoint;
use onebase_format::artifact::Role;
use onebase_format::statistics::{SequentialRecord, Source, StatisticsRecord, input_name};
use onebase_model::{LayerRun, Model, ModelConfig, Nobody, SiteInput, Tenant, TensorSpec};

use super::moments::{LayerMoments, held_window};
use super::{Kept, record_of};
use crate::{Error, Pair, Plan, Result};

/// A text on which the inputs of linear sites are measured while a fine-tune is
/// compressed: those of each site in the fine-tune whose sites before it have the deltas
/// that they were given already, so that what is encoded next is fitted to what it will
/// read when it is served.
#[derive(Debug)]
pub struct Sequential {
    base: Model,
    tokens: Vec<u32>,
    record: StatisticsRecord,
    window_tokens: usize,
}

impl Sequential {
    /// Loads a pair's base, to run `tokens` of the fine-tune's vocabulary from `source` in
    /// windows of `window_tokens`, at least one and at most the base's context.
    ///
    /// # Errors
    /// When there is no token, one is outside the vocabulary, or a model cannot be read.
    pub fn new(
        pair: &Pair,
        tokens: Vec<u32>,
        source: Source,
        window_tokens: usize,
    ) -> Result<Self> {
        if tokens.is_empty() {
            return Err(Error::ShortText { n_tokens: 0, least: 1 });
        }
        let config = ModelConfig::from_json(pair.fine_tune.config(), pair.fine_tune.dir())?;
        let vocab_size = config.vocab_size;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            return Err(onebase_model::Error::Token { token: *token, vocab_size }.into());
        }
        let base = Model::load(Checkpoint::open(pair.base.dir())?)?;
        let window_tokens = held_window(&base, window_tokens);
        let record = StatisticsRecord {
            blake3: None,
            model: record_of(&pair.fine_tune, &pair.specs)?,
            source,
            n_tokens: tokens.len(),
            sequential: Some(SequentialRecord { window_tokens }),
        };
        Ok(Self { base, tokens, record, window_tokens })
    }

    /// What a manifest says of it.
    pub fn record(&self) -> StatisticsRecord {
        self.record.clone()
    }

    /// Bytes that are held from the first linear site to the last: the residual stream of
    /// all tokens, the buffers of a window in a block, and the base, which is mapped.
    pub(crate) fn held_bytes(&self) -> u64 {
        let config = self.base.config();
        let heads = (config.n_heads + config.n_kv_heads) * config.head_dim;
        let expert_size = config.mixture.as_ref().map_or(0, |mixture| mixture.expert_size);
        let n_experts = config.mixture.as_ref().map_or(0, |mixture| mixture.n_experts);
        let width = config.intermediate_size + expert_size + n_experts;
        // The stream is copied where it is not to change, and rows of experts are gathered.
        let row = 6 * config.hidden_size + 4 * heads + 2 * width;
        let floats = self.tokens.len() * config.hidden_size + self.window_tokens * row;
        (floats * size_of::<f32>()) as u64 + self.base.checkpoint().size_bytes()
    }

    /// Bytes that measuring an input of `n` features takes beside that: sums in f64, a
    /// window's products, its inputs by column.
    pub(crate) fn measuring_bytes(&self, n: usize) -> usize {
        n * n * (size_of::<f64>() + size_of::<f32>()) + n * self.window_tokens * size_of::<f32>()
    }
}

/// A text on its path through a fine-tune that is being compressed. Tensors are asked for and
/// told of in the order of the forward pass.
pub(crate) struct SequentialRun<'a> {
    text: &'a Sequential,
    pair: &'a Pair,
    plan: &'a Plan,
    /// The embedding's delta, until the tokens are embedded.
    embedding: Option<Box<dyn DeltaLinear>>,
    /// From the first linear site on.
    streams: Option<Streams<'a>>,
    last: Option<Kept>,
}

impl fmt::Debug for SequentialRun<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SequentialRun").field("streams", &self.streams).finish_non_exhaustive()
    }
}

/// Where the tokens are. Each block is run once, when all its sites have their deltas and
/// the next block begins, or its attention is, when the feed-forward part does.
#[derive(Debug)]
struct Streams<'a> {
    run: LayerRun<'a>,
    /// With the deltas of one block: those of the blocks before it are no longer needed.
    tenant: Tenant,
}

impl<'a> SequentialRun<'a> {
    pub(crate) fn new(text: &'a Sequential, pair: &'a Pair, plan: &'a Plan) -> Self {
        Self { text, pair, plan, embedding: None, streams: None, last: None }
    }

    /// Whether the delta of a tensor has a part in what is measured; of vectors it is
    /// known before.
    pub(crate) fn uses(&self, spec: &TensorSpec) -> bool {
        matches!(spec.role, Role::Linear | Role::Embedding)
    }

    /// The second moment of what a linear site reads, `Σ x xᵀ` over the number of all
    /// tokens; `None` of an expert that no token is sent to, and of what is no linear site.
    ///
    /// # Errors
    /// When a vector cannot be encoded, or an input is no finite number.
    pub(crate) fn moment(&mut self, spec: &TensorSpec) -> Result<Option<Arc<SecondMoment>>> {
        if spec.role == Role::Head {
            // The last site is behind, and tables are the largest tensors.
            (self.streams, self.last) = (None, None);
        }
        let Some(input) = SiteInput::of_weight(&spec.name).filter(|_| spec.role == Role::Linear)
        else {
            return Ok(None);
        };
        if let Some(kept) = self.last.as_ref().filter(|kept| kept.input == input) {
            return Ok(kept.moment.clone());
        }
        // Gone before the next one is measured: one at a time is in memory.
        self.last = None;
        let (layer, site_input) = input;
        let n_tokens = self.text.tokens.len();
        let Streams { run, tenant } = self.reach(layer)?;
        if !matches!(site_input, SiteInput::Attention | SiteInput::AttentionOutput) {
            run.run_attention(Some(tenant));
        }
        let mut moments = LayerMoments::default();
        run.peek(Some(tenant), site_input, &mut moments);
        let n = spec.shape[1];
        let values = moments.into_inner().find(|(input, _)| *input == site_input);
        let moment = match values {
            Some((_, moment)) => {
                #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
                let mean = |v: &f64| (v / n_tokens as f64) as f32;
                let values: Vec<f32> = moment.values.iter().map(mean).collect();
                if !values.iter().all(|v| v.is_finite()) {
                    let path = self.pair.fine_tune.dir().to_owned();
                    let input = input_name(layer, &site_input.to_string());
                    return Err(Error::InputNotFinite { path, input });
                }
                let is_seen = values.iter().any(|v| *v != 0.0);
                is_seen.then(|| SecondMoment::new(values, n)).flatten().map(Arc::new)
            }
            None => None,
        };
        self.last = Some(Kept { input, moment: moment.clone() });
        Ok(moment)
    }

    /// Takes the delta that a tensor was given; one that is not told of is the base's or,
    /// of an embedding, the fine-tune's.
    ///
    /// # Errors
    /// As [`SequentialRun::moment`].
    pub(crate) fn tell(&mut self, spec: &TensorSpec, delta: Box<dyn DeltaLinear>) -> Result<()> {
        match (spec.role, SiteInput::of_weight(&spec.name)) {
            (Role::Embedding, _) => self.embedding = Some(delta),
            (Role::Linear, Some((layer, _))) => {
                let is_site = self.reach(layer)?.tenant.set_delta(&spec.name, Some(delta));
                assert!(is_site, "the delta of {} has another shape", spec.name);
            }
            _ => {}
        }
        Ok(())
    }

    /// Brings the streams to a block: through those before it, which have all their deltas.
    fn reach(&mut self, layer: usize) -> Result<&mut Streams<'a>> {
        let streams = match self.streams.take() {
            Some(streams) => streams,
            None => self.begin()?,
        };
        let Streams { run, tenant } = self.streams.insert(streams);
        while run.next_layer() < layer {
            let done = run.next_layer();
            run.run_layer(Some(tenant), &mut Nobody, |_| {});
            tenant.clear_layer(done);
        }
        match &mut self.streams {
            Some(streams) => Ok(streams),
            None => unreachable!("they were put there"),
        }
    }

    /// Embeds the tokens as the artifact will.
    fn begin(&mut self) -> Result<Streams<'a>> {
        let (base, fine_tune) = (&self.text.base, &self.pair.fine_tune);
        let mut table = BTreeMap::new();
        let specs = &self.pair.specs;
        let embedding = specs.iter().find(|spec| spec.role == Role::Embedding);
        if let (Some(spec), Some(delta)) = (embedding, self.embedding.take()) {
            table.insert(spec.name.clone(), delta);
        }
        let embedded = Tenant::of_fine_tune(base, fine_tune, table)?;
        let windows = self.text.tokens.chunks(self.text.window_tokens);
        let run = LayerRun::new(base, windows, Some(&embedded))?;
        // The delta of the embedding is not held any longer than that.
        drop(embedded);
        let tenant = Tenant::of_fine_tune(base, fine_tune, self.vectors()?)?;
        Ok(Streams { run, tenant })
    }

    /// The deltas of the vectors that are stored as such. They are small, and some are
    /// needed before their turn to be encoded comes: encoding them twice is simplest.
    fn vectors(&self) -> Result<BTreeMap<String, Box<dyn DeltaLinear>>> {
        let mut deltas = BTreeMap::new();
        for (index, spec) in self.pair.specs.iter().enumerate() {
            if spec.role != Role::Vector || self.pair.is_unchanged(index)? {
                continue;
            }
            let Some(codec) = self.plan.codec(spec, &spec.shape) else { continue };
            let delta = self.pair.delta(&spec.name)?;
            let prepared = codec.encode(&delta).and_then(|encoded| codec.prepare(encoded));
            let prepared = prepared.map_err(|e| delta.explain(e))?;
            deltas.insert(spec.name.clone(), prepared);
        }
        Ok(deltas)
    }
}
