use std::collections::BTreeMap;
use std::sync::OnceLock;

use onebase_format::artifact::Role;
use onebase_format::{Checkpoint, Digest};
use onebase_kernels::Backend;

use crate::decoder::{Decoder, Loader, tensor_specs};
use crate::delta::NodeCache;
use crate::linear::Linear;
use crate::rope::Rope;
use crate::weights::Weight;
use crate::{Error, ModelConfig, Result};

/// A base model in memory; its weights stay mapped from the checkpoint.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) decoder: Decoder<Linear, Vec<f32>, Weight>,
    pub(crate) rope: Rope,
    pub(crate) backend: Backend,
    checkpoint: Checkpoint,
    digests: OnceLock<BTreeMap<String, Digest>>,
    pub(crate) nodes: NodeCache,
}

impl Model {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// When its configuration is not supported or its tensors do not fit it.
    pub fn load(checkpoint: Checkpoint) -> Result<Self> {
        let config = ModelConfig::from_json(checkpoint.config(), checkpoint.dir())?;
        check_tensors(&checkpoint, &config)?;
        let decoder = Decoder::load(&config, &mut BaseLoader(&checkpoint))?;
        let rope = Rope::new(&config);
        let backend = Backend::active();
        Ok(Self {
            config,
            decoder,
            rope,
            backend,
            checkpoint,
            digests: OnceLock::new(),
            nodes: NodeCache::default(),
        })
    }

    /// The same model on another of this processor's instruction sets.
    pub fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The checkpoint it was loaded from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The digest of every tensor, computed when first asked for.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn digests(&self) -> Result<&BTreeMap<String, Digest>> {
        if let Some(digests) = self.digests.get() {
            return Ok(digests);
        }
        let specs = tensor_specs(&self.config);
        let names: Vec<&str> = specs.iter().map(|s| s.name.as_str()).collect();
        let digests = self.checkpoint.digests(&names)?;
        let digests = names.into_iter().map(str::to_owned).zip(digests).collect();
        Ok(self.digests.get_or_init(|| digests))
    }
}

/// Checks that a checkpoint has the tensors of its configuration, in their
/// shapes, and no others.
///
/// Buffers that old programs saved beside the weights and that follow from the
/// configuration are passed over, as is a second copy of a tied embedding.
///
/// # Errors
/// When a tensor is missing, unexpected or of another shape, or a head that
/// should be tied to the embedding has weights of its own.
pub fn check_tensors(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let specs = tensor_specs(config);
    for spec in &specs {
        let tensor = checkpoint.tensor(&spec.name)?;
        if tensor.shape() != spec.shape {
            return Err(Error::Shape {
                path: tensor.path().to_owned(),
                tensor: spec.name.clone(),
                expected: spec.shape.clone(),
                got: tensor.shape().to_vec(),
            });
        }
    }
    let known: std::collections::BTreeSet<&str> = specs.iter().map(|s| s.name.as_str()).collect();
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    if config.tied && checkpoint.contains(head) {
        let [own, tied] = [checkpoint.tensor(head)?, checkpoint.tensor(embedding)?];
        if own.digest()? != tied.digest()? {
            return Err(Error::UntiedHead { path: own.path().to_owned() });
        }
    }
    let derived =
        |name: &str| name.ends_with(".rotary_emb.inv_freq") || (config.tied && name == head);
    match checkpoint.names().find(|name| !known.contains(name) && !derived(name)) {
        Some(tensor) => Err(Error::UnexpectedTensor {
            path: checkpoint.dir().to_owned(),
            tensor: tensor.to_owned(),
        }),
        None => Ok(()),
    }
}

struct BaseLoader<'a>(&'a Checkpoint);

impl Loader for BaseLoader<'_> {
    type Linear = Linear;
    type Vector = Vec<f32>;
    type Table = Weight;

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = Weight::load(&self.0.tensor(&format!("{module}.weight"))?);
        let bias =
            if bias { Some(self.vector(&format!("{module}.bias"), shape[0])?) } else { None };
        Ok(Linear { weight, bias })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.0.tensor(name)?;
        let mut wide = vec![0.0; len];
        tensor.dtype().widen(&tensor.bytes(), &mut wide);
        Ok(wide)
    }

    fn router(&mut self, name: &str, [n_experts, hidden]: [usize; 2]) -> Result<Vec<f32>> {
        self.vector(name, n_experts * hidden)
    }

    fn table(&mut self, name: &str, _: Role, _: [usize; 2]) -> Result<Weight> {
        Ok(Weight::load(&self.0.tensor(name)?))
    }
}
