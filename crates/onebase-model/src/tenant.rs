use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use onebase_codec::DeltaLinear;
use onebase_format::artifact::{Artifact, Role, Storage};
use onebase_format::{Checkpoint, Tensor};
use onebase_kernels::add_assign;

use crate::decoder::{Decoder, Layer, Loaded, Loader};
use crate::delta::{GainedNode, NodeCache, Stored, stored_delta};
use crate::linear::SiteDelta;
use crate::rope::Rope;
use crate::weights::Weight;
use crate::{Error, Model, ModelConfig, Result};

/// One fine-tune, loaded against its base: what it changes, and nothing else.
pub struct Tenant {
    pub(crate) config: ModelConfig,
    pub(crate) decoder: Loaded<TenantLoader<'static, 'static>>,
    pub(crate) rope: Rope,
    resident_bytes: usize,
}

/// What a tenant changes in a token table `[vocab_size, hidden_size]`.
pub(crate) enum TableDelta {
    /// Nothing.
    Unchanged,
    /// A delta on the base's rows, and the rows past them.
    Delta { delta: Box<dyn DeltaLinear>, added: Option<Weight> },
    /// Everything: its own rows.
    Exact(Weight),
}

impl Tenant {
    /// Loads an artifact against a base.
    ///
    /// Every file's digest and the digest of every base tensor are compared with
    /// the manifest first.
    ///
    /// # Errors
    /// When the base is another one, or the artifact is damaged or does not fit
    /// the architecture.
    pub fn load(model: &Model, artifact: &Artifact) -> Result<Self> {
        Self::load_inner(model, artifact, None)
    }

    /// [`Tenant::load`], the delta of each linear site, by the tensor's name, replaced
    /// by what `wrap` makes of it, which must have its shape.
    ///
    /// # Errors
    /// As there.
    pub fn load_with(model: &Model, artifact: &Artifact, wrap: Wrap<'_>) -> Result<Self> {
        Self::load_inner(model, artifact, Some(wrap))
    }

    fn load_inner(model: &Model, artifact: &Artifact, wrap: Option<Wrap<'_>>) -> Result<Self> {
        model.digests()?.check(model.checkpoint().dir(), &model.config, artifact)?;
        artifact.check_files()?;
        let config = ModelConfig::of_artifact(artifact, model.checkpoint())?;
        model.config.check_fine_tune(&config, artifact.dir())?;
        model.nodes.clean();
        let mut loader = TenantLoader {
            artifact,
            base: model.checkpoint(),
            base_rows: model.config.vocab_size,
            nodes: &model.nodes,
            wrap,
            resident_bytes: 0,
        };
        let Decoder { embedding, layers, norm, head } = Decoder::load(&config, &mut loader)?;
        let decoder = Decoder { embedding, layers, norm, head };
        let rope = Rope::new(&config);
        // Activations and caches are the base's matter.
        let config = ModelConfig { quantization: model.config.quantization, ..config };
        Ok(Self { config, decoder, rope, resident_bytes: loader.resident_bytes })
    }

    /// A fine-tune that is being compressed: tensors with a delta among `deltas`, by name,
    /// are the base's and that; other linear sites have the base's weight, until
    /// [`Tenant::set_delta`] gives them a delta; all others are the fine-tune's own, token
    /// tables mapped from its files.
    ///
    /// A delta is `[out_features, in_features]` of a linear site, `[1, n]` of a vector, and of
    /// a token table has as many rows as the base's: those past them are the fine-tune's own.
    ///
    /// # Errors
    /// When the fine-tune's configuration is not supported or differs from the base's in
    /// more than it may, or its tensors or the deltas do not fit.
    pub fn of_fine_tune(
        model: &Model,
        fine_tune: &Checkpoint,
        deltas: BTreeMap<String, Box<dyn DeltaLinear>>,
    ) -> Result<Self> {
        let config = ModelConfig::from_json(fine_tune.config(), fine_tune.dir())?;
        model.config.check_fine_tune(&config, fine_tune.dir())?;
        let base = model.checkpoint();
        let base_rows = model.config.vocab_size;
        let mut loader = FineTuneLoader { fine_tune, base, base_rows, deltas, resident_bytes: 0 };
        let Decoder { embedding, layers, norm, head } = Decoder::load(&config, &mut loader)?;
        let decoder = Decoder { embedding, layers, norm, head };
        let rope = Rope::new(&config);
        // Activations and caches are the base's matter.
        let config = ModelConfig { quantization: model.config.quantization, ..config };
        Ok(Self { config, decoder, rope, resident_bytes: loader.resident_bytes })
    }

    /// Replaces the delta of a linear site, by its weight's name; `None` for the base's
    /// weight. `false` where there is no such site, or the delta has another shape.
    pub fn set_delta(&mut self, tensor: &str, delta: Option<Box<dyn DeltaLinear>>) -> bool {
        let new_bytes = delta.as_ref().map_or(0, |delta| delta.resident_bytes());
        let shape = delta.as_ref().map(|delta| delta.shape());
        let Some(site) = self.decoder.site_mut(tensor) else { return false };
        if shape.is_some_and(|shape| shape != site.shape) {
            return false;
        }
        let old_bytes = site.delta.as_ref().map_or(0, |d| d.as_linear().resident_bytes());
        site.delta = delta.map(Stored::Own);
        self.resident_bytes = self.resident_bytes - old_bytes + new_bytes;
        true
    }

    /// Lets go of the deltas of all linear sites of a block: they have the base's weight.
    pub fn clear_layer(&mut self, layer: usize) {
        let Some(layer) = self.decoder.layers.get_mut(layer) else { return };
        let mut freed = 0;
        for site in layer.sites_mut() {
            freed += site.delta.take().map_or(0, |d| d.as_linear().resident_bytes());
        }
        self.resident_bytes -= freed;
    }

    /// The fine-tune's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of memory that its parts hold, those that it shares with others included.
    pub fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }
}

/// Bytes of memory that the parts of tenants hold, nodes that they share counted once: what a
/// step with a row of each reads.
pub fn resident_bytes_of<'a>(tenants: impl Iterator<Item = &'a Tenant>) -> usize {
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for tenant in tenants {
        bytes += tenant.resident_bytes;
        for site in tenant.decoder.layers.iter().flat_map(Layer::sites) {
            let Some(Stored::Path(path)) = &site.delta else { continue };
            for GainedNode { node, .. } in &path.nodes {
                if !seen.insert(Arc::as_ptr(node).cast::<()>()) {
                    bytes -= node.resident_bytes();
                }
            }
        }
    }
    bytes
}

/// What is made of the delta of each linear site.
pub type Wrap<'a> = &'a mut dyn FnMut(&str, Box<dyn DeltaLinear>) -> Box<dyn DeltaLinear>;

pub(crate) struct TenantLoader<'a, 'w> {
    artifact: &'a Artifact,
    base: &'a Checkpoint,
    /// Rows of the base's token tables.
    base_rows: usize,
    nodes: &'a NodeCache,
    wrap: Option<Wrap<'w>>,
    resident_bytes: usize,
}

impl TenantLoader<'_, '_> {
    fn check_shape(&self, tensor: &str, expected: &[usize], got: &[usize]) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(Error::Shape {
            path: self.artifact.dir().to_owned(),
            tensor: tensor.to_owned(),
            expected: expected.to_vec(),
            got: got.to_vec(),
        })
    }

    /// A tensor of the fine-tune's own, `None` when it is the base's.
    fn exact(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        let record = self.artifact.record_for(name, Role::Vector)?;
        self.check_shape(name, shape, &record.shape)?;
        let wide = self.artifact.exact(name)?.map(|tensor| tensor.widen());
        self.resident_bytes += wide.as_ref().map_or(0, |v| size_of_val(v.as_slice()));
        Ok(wide)
    }

    /// The prepared delta of a tensor, `None` when it is the base's.
    fn delta(&self, tensor: &str, shape: [usize; 2]) -> Result<Option<Stored>> {
        let Some(delta) = stored_delta(self.artifact, tensor, self.nodes)? else {
            return Ok(None);
        };
        self.check_shape(tensor, &shape, &delta.as_linear().shape())?;
        Ok(Some(delta))
    }

    /// A vector that is stored as a delta of the base's; `None` when it is not.
    fn vector_sum(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let Some(delta) = self.delta(name, [1, len])? else { return Ok(None) };
        let base = self.base.tensor(name)?;
        self.check_shape(name, &[len], base.shape())?;
        Ok(Some(vector_sum(&base, delta.as_linear())))
    }
}

/// A vector of the base and its delta, which need not stay one: it is no larger as itself.
/// Both have one length.
fn vector_sum(base: &Tensor<'_>, delta: &dyn DeltaLinear) -> Vec<f32> {
    let len = delta.shape()[1];
    let (mut sum, mut change) = (vec![0.0; len], vec![0.0; len]);
    base.dtype().widen(&base.bytes(), &mut sum);
    delta.write_rows(0..1, &mut change);
    add_assign(&mut sum, &change);
    sum
}

impl Loader for TenantLoader<'_, '_> {
    type Linear = SiteDelta;
    type Vector = Option<Vec<f32>>;
    type Table = TableDelta;

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<SiteDelta> {
        let weight = format!("{module}.weight");
        let record = self.artifact.record_for(&weight, Role::Linear)?;
        self.check_shape(&weight, &shape, &record.shape)?;
        let delta = self.delta(&weight, shape)?;
        let delta = match &mut self.wrap {
            Some(wrap) => delta.map(|delta| Stored::Own(wrap(&weight, delta.into_linear()))),
            None => delta,
        };
        self.resident_bytes += delta.as_ref().map_or(0, |d| d.as_linear().resident_bytes());
        let bias = if bias { self.vector(&format!("{module}.bias"), shape[0])? } else { None };
        Ok(SiteDelta { shape, delta, bias })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        if let Some(own) = self.exact(name, &[len])? {
            return Ok(Some(own));
        }
        let sum = self.vector_sum(name, len)?;
        self.resident_bytes += sum.as_ref().map_or(0, |v| size_of_val(v.as_slice()));
        Ok(sum)
    }

    fn folded(&mut self, _: usize) -> Option<Vec<f32>> {
        None
    }

    fn router(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Vec<f32>>> {
        self.exact(name, &shape)
    }

    fn table(&mut self, name: &str, role: Role, shape: [usize; 2]) -> Result<TableDelta> {
        let record = self.artifact.record_for(name, role)?;
        self.check_shape(name, &shape, &record.shape)?;
        let table = match &record.storage {
            Storage::Unchanged => {
                self.check_shape(name, &[self.base_rows, shape[1]], &record.shape)?;
                TableDelta::Unchanged
            }
            Storage::Exact { .. } => match self.artifact.exact(name)? {
                Some(tensor) => TableDelta::Exact(Weight::exact(&tensor)),
                None => unreachable!("the record says it is exact"),
            },
            Storage::Codec { .. } | Storage::Path { .. } => {
                let base_shape = [self.base_rows, shape[1]];
                let added = self.artifact.added_rows(name)?;
                let Some(delta) = self.delta(name, base_shape)? else {
                    unreachable!("the record says it has a delta")
                };
                let delta = delta.into_linear();
                self.resident_bytes += delta.resident_bytes();
                TableDelta::Delta { delta, added: added.as_ref().map(Weight::exact) }
            }
        };
        if let TableDelta::Delta { added: Some(weight), .. } | TableDelta::Exact(weight) = &table {
            self.resident_bytes += weight.resident_bytes();
        }
        Ok(table)
    }
}

/// Loads a fine-tune that is being compressed, see [`Tenant::of_fine_tune`].
struct FineTuneLoader<'a> {
    fine_tune: &'a Checkpoint,
    base: &'a Checkpoint,
    /// Rows of the base's token tables.
    base_rows: usize,
    /// Those that nobody has asked for yet.
    deltas: BTreeMap<String, Box<dyn DeltaLinear>>,
    resident_bytes: usize,
}

impl FineTuneLoader<'_> {
    fn check_shape(&self, tensor: &str, expected: &[usize], got: &[usize]) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(Error::Shape {
            path: self.fine_tune.dir().to_owned(),
            tensor: tensor.to_owned(),
            expected: expected.to_vec(),
            got: got.to_vec(),
        })
    }

    /// A tensor of the fine-tune.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let tensor = self.fine_tune.tensor(name)?;
        self.check_shape(name, shape, tensor.shape())?;
        Ok(tensor)
    }

    fn delta(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Box<dyn DeltaLinear>>> {
        let Some(delta) = self.deltas.remove(name) else { return Ok(None) };
        self.check_shape(name, &shape, &delta.shape())?;
        Ok(Some(delta))
    }

    fn own(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        let tensor = self.tensor(name, shape)?;
        let mut wide = vec![0.0; tensor.n_weights()];
        tensor.dtype().widen(&tensor.bytes(), &mut wide);
        self.resident_bytes += size_of_val(wide.as_slice());
        Ok(Some(wide))
    }
}

impl Loader for FineTuneLoader<'_> {
    type Linear = SiteDelta;
    type Vector = Option<Vec<f32>>;
    type Table = TableDelta;

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<SiteDelta> {
        let delta = self.delta(&format!("{module}.weight"), shape)?.map(Stored::Own);
        self.resident_bytes += delta.as_ref().map_or(0, |d| d.as_linear().resident_bytes());
        let bias = if bias { self.vector(&format!("{module}.bias"), shape[0])? } else { None };
        Ok(SiteDelta { shape, delta, bias })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let Some(delta) = self.delta(name, [1, len])? else { return self.own(name, &[len]) };
        let base = self.base.tensor(name)?;
        self.check_shape(name, &[len], base.shape())?;
        self.resident_bytes += len * size_of::<f32>();
        Ok(Some(vector_sum(&base, delta.as_ref())))
    }

    fn folded(&mut self, _: usize) -> Option<Vec<f32>> {
        None
    }

    fn router(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Vec<f32>>> {
        self.own(name, &shape)
    }

    fn table(&mut self, name: &str, _: Role, shape: [usize; 2]) -> Result<TableDelta> {
        let base_rows = self.base_rows;
        let Some(delta) = self.delta(name, [base_rows, shape[1]])? else {
            return Ok(TableDelta::Exact(Weight::load(&self.tensor(name, &shape)?)));
        };
        let tensor = self.tensor(name, &shape)?;
        let size = tensor.dtype().size_bytes();
        let added = (shape[0] > base_rows)
            .then(|| Weight::copy(tensor.dtype(), &tensor.bytes()[base_rows * shape[1] * size..]));
        let added_bytes = added.as_ref().map_or(0, Weight::resident_bytes);
        self.resident_bytes += delta.resident_bytes() + added_bytes;
        Ok(TableDelta::Delta { delta, added })
    }
}
