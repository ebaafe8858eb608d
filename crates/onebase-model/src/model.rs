use std::sync::OnceLock;

use onebase_format::Checkpoint;
use onebase_format::artifact::Role;
use onebase_kernels::Backend;

use crate::decoder::{Decoder, Loader, TensorSpec, tensor_specs};
use crate::delta::NodeCache;
use crate::linear::Linear;
use crate::quantized::{Identities, Rotation, base_digests, check_stored, parts_of};
use crate::rope::Rope;
use crate::weights::{BaseWeight, CodedWeight, Weight};
use crate::{Error, ModelConfig, Result};

/// A base model in memory; its weights stay mapped from the checkpoint.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) decoder: Decoder<Linear, Vec<f32>, BaseWeight>,
    pub(crate) rope: Rope,
    pub(crate) rotation: Option<Rotation>,
    pub(crate) backend: Backend,
    checkpoint: Checkpoint,
    digests: OnceLock<Identities>,
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
        let decoder =
            Decoder::load(&config, &mut BaseLoader { checkpoint: &checkpoint, config: &config })?;
        let rope = Rope::new(&config);
        let rotation = Rotation::load(&checkpoint, &config)?;
        let backend = Backend::active();
        Ok(Self {
            config,
            decoder,
            rope,
            rotation,
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

    /// The digests of its tensors, computed when first asked for.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn digests(&self) -> Result<&Identities> {
        if let Some(digests) = self.digests.get() {
            return Ok(digests);
        }
        let digests = base_digests(&self.checkpoint, &self.config)?;
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
    if config.quantization.is_some() {
        return check_stored(checkpoint, config);
    }
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

struct BaseLoader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
}

impl BaseLoader<'_> {
    /// The matrix of a module, in codes where `bits` is not 16.
    fn weight(&self, module: &str, role: Role, bits: u32, shape: [usize; 2]) -> Result<BaseWeight> {
        let name = format!("{module}.weight");
        if bits == 16 {
            return Ok(BaseWeight::Plain(Weight::load(&self.checkpoint.tensor(&name)?)));
        }
        // Inputs of tables are not rounded.
        let has_sums = role == Role::Linear;
        let spec = TensorSpec { name, role, shape: shape.to_vec() };
        let parts = parts_of(&spec, self.config);
        let coded = CodedWeight::load(self.checkpoint, module, shape[0], parts, has_sums)?;
        Ok(BaseWeight::Coded(coded))
    }
}

impl Loader for BaseLoader<'_> {
    type Linear = Linear;
    type Vector = Vec<f32>;
    type Table = BaseWeight;

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let bits = self.config.quantization.map_or(16, |q| q.weight_bits);
        let weight = self.weight(module, Role::Linear, bits, shape)?;
        let bias =
            if bias { Some(self.vector(&format!("{module}.bias"), shape[0])?) } else { None };
        Ok(Linear { weight, bias })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.checkpoint.tensor(name)?;
        let mut wide = vec![0.0; len];
        tensor.dtype().widen(&tensor.bytes(), &mut wide);
        Ok(wide)
    }

    fn folded(&mut self, len: usize) -> Vec<f32> {
        vec![1.0; len]
    }

    fn router(&mut self, name: &str, [n_experts, hidden]: [usize; 2]) -> Result<Vec<f32>> {
        self.vector(name, n_experts * hidden)
    }

    fn table(&mut self, name: &str, role: Role, shape: [usize; 2]) -> Result<BaseWeight> {
        let bits = self.config.quantization.map_or(16, |q| q.table_bits);
        self.weight(name.strip_suffix(".weight").unwrap_or(name), role, bits, shape)
    }
}
