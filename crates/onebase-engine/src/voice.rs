use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use onebase_format::Digest;
use onebase_format::artifact::{Artifact, Quality, Sizes};
use onebase_model::{KvCache, Logits, Model, ModelConfig, Segment, Tenant, TextModel};

use crate::{Error, Result};

/// Tokens of the probe.
const PROBE_TOKENS: usize = 16;

/// Who answers: the base, or one generation of a tenant, in memory. It never changes.
#[derive(Debug)]
pub struct Voice {
    name: String,
    generation: u64,
    digest: Digest,
    tenant: Option<Tenant>,
    text: TextModel,
    config: ModelConfig,
    /// Requests that are answered by it.
    pub(crate) uses: AtomicUsize,
}

impl Voice {
    /// The base, whose generation is 0.
    pub(crate) fn base(name: String, digest: Digest, model: &Model) -> Result<Self> {
        let text = TextModel::from_checkpoint(model.checkpoint())?;
        let config = model.config().clone();
        let uses = AtomicUsize::new(0);
        Ok(Self { name, generation: 0, digest, tenant: None, text, config, uses })
    }

    pub(crate) fn tenant(
        name: String,
        generation: u64,
        digest: Digest,
        tenant: Tenant,
        text: TextModel,
    ) -> Self {
        let (config, uses) = (tenant.config().clone(), AtomicUsize::new(0));
        Self { name, generation, digest, tenant: Some(tenant), text, config, uses }
    }

    /// The name it is asked by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which loading of the tenant this is; 0 for the base.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The digest of the delta, of the base's tensors for the base.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its tokenizer, chat template and defaults.
    pub fn text(&self) -> &TextModel {
        &self.text
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its weights; `None` for the base's own.
    pub fn weights(&self) -> Option<&Tenant> {
        self.tenant.as_ref()
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.uses.load(Ordering::Acquire) > 0
    }
}

/// What is known of a tenant's artifact without its weights.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Bytes on disk and what they cover.
    pub sizes: Sizes,
    /// What the fine-tune was called.
    pub fine_tune: String,
    /// The codecs in use, in the order of the manifest.
    pub codecs: Vec<String>,
    /// How much of the fine-tune it kept, where that was measured.
    pub quality: Option<Quality>,
}

impl Facts {
    pub(crate) fn of(artifact: &Artifact) -> Self {
        let manifest = artifact.manifest();
        let mut codecs: Vec<String> = Vec::new();
        for codec in &manifest.codecs {
            if !codecs.contains(&codec.name) {
                codecs.push(codec.name.clone());
            }
        }
        let (fine_tune, quality) = (manifest.fine_tune.clone(), manifest.quality());
        Self { sizes: artifact.sizes(), fine_tune, codecs, quality }
    }

    /// The task on which most skill was kept, and how much.
    pub fn skill_kept(&self) -> Option<(String, f64)> {
        let tasks = self.quality.iter().flat_map(|quality| &quality.tasks);
        let kept = tasks.filter_map(|task| Some((task.name.clone(), task.skill_kept?)));
        kept.max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// A fixed text on which every delta must change the logits.
#[derive(Debug)]
pub(crate) struct Probe {
    tokens: Vec<u32>,
    /// The base's logits after each token.
    base: Vec<f32>,
}

impl Probe {
    pub(crate) fn new(model: &Model) -> Result<Self> {
        let vocab_size = model.config().vocab_size;
        let n = PROBE_TOKENS.min(vocab_size).min(model.config().context_tokens);
        // Spread over the vocabulary, so that a delta of few token rows is likely met.
        let spread = (0..n).map(|i| i * vocab_size / n);
        let tokens = spread.filter_map(|token| u32::try_from(token).ok()).collect();
        let mut probe = Self { tokens, base: Vec::new() };
        probe.base = probe.logits(model, None)?;
        Ok(probe)
    }

    fn logits(&self, model: &Model, tenant: Option<&Tenant>) -> Result<Vec<f32>> {
        let mut cache = KvCache::new(tenant.map_or(model.config(), Tenant::config));
        let (tokens, logits) = (&self.tokens[..], Logits::All);
        let mut segments = [Segment { tokens, tenant, cache: &mut cache, logits }];
        let mut logits = model.forward(&mut segments)?;
        Ok(logits.pop().unwrap_or_default())
    }

    /// Refuses a tenant that answers as its base, or with what is no number.
    pub(crate) fn check(
        &self,
        model: &Model,
        tenant: &Tenant,
        path: PathBuf,
        facts: &Facts,
    ) -> Result<()> {
        let logits = self.logits(model, Some(tenant))?;
        if logits.iter().any(|logit| logit.is_nan()) {
            let n_tokens = self.tokens.len();
            return Err(onebase_model::Error::NotFinite { n_tokens }.into());
        }
        let n = self.tokens.len().max(1);
        let rows = logits.chunks(logits.len() / n).zip(self.base.chunks(self.base.len() / n));
        for (own, base) in rows {
            // Tokens past the base's vocabulary have no logit to compare with.
            if own[..base.len().min(own.len())] != *base {
                return Ok(());
            }
        }
        Err(Error::NoEffect { path, claimed: facts.skill_kept() })
    }
}
