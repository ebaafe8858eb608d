//! The tensors of a decoder: their names, shapes and places, written once and
//! filled by whoever loads a base, loads a tenant or only lists them.

use onebase_format::artifact::Role;

use crate::{Architecture, ModelConfig, Result};

/// A decoder whose linear sites are `L`, vectors `V` and token tables `T`.
#[derive(Debug)]
pub(crate) struct Decoder<L, V, T> {
    pub(crate) embedding: T,
    pub(crate) layers: Vec<Layer<L, V>>,
    pub(crate) norm: V,
    /// Absent where the embedding is the head.
    pub(crate) head: Option<T>,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Layer<L, V> {
    pub(crate) input_norm: V,
    pub(crate) q: L,
    pub(crate) k: L,
    pub(crate) v: L,
    pub(crate) o: L,
    /// Norms on the heads of q and k.
    pub(crate) qk_norm: Option<[V; 2]>,
    pub(crate) post_norm: V,
    /// What chooses the experts of a token, `[n_experts, hidden_size]`; absent
    /// where all tokens have one network.
    pub(crate) router: Option<V>,
    /// The feed-forward networks: the experts, or the one.
    pub(crate) mlps: Vec<Mlp<L>>,
}

/// A feed-forward network.
#[derive(Debug)]
pub(crate) struct Mlp<L> {
    pub(crate) gate: L,
    pub(crate) up: L,
    pub(crate) down: L,
}

/// What the modules of a block's experts are called.
struct ExpertNames {
    /// The module with the router `gate` and the list `experts`.
    block: &'static str,
    /// The gate's, up and down projection of an expert.
    sites: [&'static str; 3],
}

impl ExpertNames {
    fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Mixtral => Self { block: "block_sparse_moe", sites: ["w1", "w3", "w2"] },
            _ => Self { block: "mlp", sites: MLP_SITES },
        }
    }
}

/// The projections of a feed-forward network: gate, up and down.
const MLP_SITES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Makes the members of a [`Decoder`].
pub(crate) trait Loader {
    type Linear;
    type Vector;
    type Table;

    /// The site `module`, its weight `[out_features, in_features]` and, where
    /// `bias`, its bias `[out_features]`.
    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<Self::Linear>;
    fn vector(&mut self, name: &str, len: usize) -> Result<Self::Vector>;
    /// The weight of a norm that is in the sites that follow: ones.
    fn folded(&mut self, len: usize) -> Self::Vector;
    /// A router, `[n_experts, hidden_size]`, which is kept as vectors are: a token
    /// that is sent to another expert is not a little off, it is elsewhere.
    fn router(&mut self, name: &str, shape: [usize; 2]) -> Result<Self::Vector>;
    /// A table `[vocab_size, hidden_size]`.
    fn table(&mut self, name: &str, role: Role, shape: [usize; 2]) -> Result<Self::Table>;
}

/// What a loader makes.
pub(crate) type Loaded<R> =
    Decoder<<R as Loader>::Linear, <R as Loader>::Vector, <R as Loader>::Table>;

impl<L, V, T> Decoder<L, V, T> {
    /// Loads every member, in the order of the forward pass.
    pub(crate) fn load(
        config: &ModelConfig,
        loader: &mut impl Loader<Linear = L, Vector = V, Table = T>,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let table = [config.vocab_size, hidden];
        let embedding = loader.table("model.embed_tokens.weight", Role::Embedding, table)?;
        let layers = (0..config.n_layers)
            .map(|index| Layer::load(config, index, loader))
            .collect::<Result<_>>()?;
        let norm = loader.vector("model.norm.weight", hidden)?;
        let head = if config.tied {
            None
        } else {
            Some(loader.table("lm_head.weight", Role::Head, table)?)
        };
        Ok(Self { embedding, layers, norm, head })
    }
}

impl<L, V, T> Decoder<L, V, T> {
    /// The linear site of a weight's name, `model.layers.3.mlp.up_proj.weight`.
    pub(crate) fn site_mut(&mut self, tensor: &str) -> Option<&mut L> {
        let (layer, module) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = self.layers.get_mut(layer.parse::<usize>().ok()?)?;
        layer.site_mut(module.strip_suffix(".weight")?)
    }
}

impl<L, V> Layer<L, V> {
    /// A linear site by its name within the block: `mlp.up_proj`.
    fn site_mut(&mut self, site: &str) -> Option<&mut L> {
        match site {
            "self_attn.q_proj" => return Some(&mut self.q),
            "self_attn.k_proj" => return Some(&mut self.k),
            "self_attn.v_proj" => return Some(&mut self.v),
            "self_attn.o_proj" => return Some(&mut self.o),
            _ => {}
        }
        let (mlp, matrix) = match site.split_once(".experts.") {
            Some((_, expert)) if self.router.is_some() => {
                let (number, matrix) = expert.split_once('.')?;
                (number.parse().ok()?, matrix)
            }
            None if self.router.is_none() => (0, site.strip_prefix("mlp.")?),
            _ => return None,
        };
        let mlp = self.mlps.get_mut(mlp)?;
        match matrix {
            "gate_proj" | "w1" => Some(&mut mlp.gate),
            "up_proj" | "w3" => Some(&mut mlp.up),
            "down_proj" | "w2" => Some(&mut mlp.down),
            _ => None,
        }
    }

    /// Every linear site.
    pub(crate) fn sites(&self) -> impl Iterator<Item = &L> {
        let mlps = self.mlps.iter().flat_map(|Mlp { gate, up, down }| [gate, up, down]);
        [&self.q, &self.k, &self.v, &self.o].into_iter().chain(mlps)
    }

    /// Every linear site.
    pub(crate) fn sites_mut(&mut self) -> impl Iterator<Item = &mut L> {
        let mlps = self.mlps.iter_mut();
        let mlps = mlps.flat_map(|Mlp { gate, up, down }| [gate, up, down]);
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o].into_iter().chain(mlps)
    }

    fn load<R: Loader<Linear = L, Vector = V>>(
        config: &ModelConfig,
        index: usize,
        loader: &mut R,
    ) -> Result<Self> {
        let module = format!("model.layers.{index}");
        let hidden = config.hidden_size;
        let q_size = config.n_heads * config.head_dim;
        let kv_size = config.n_kv_heads * config.head_dim;
        let (qkv_bias, o_bias) = (config.qkv_bias, config.o_bias);
        let attention = format!("{module}.self_attn");
        let mixture = config.mixture_of(index);
        let ExpertNames { block, sites } = ExpertNames::of(config.architecture);
        let norm = |loader: &mut R, name: &str| {
            if config.is_rotated() {
                return Ok(loader.folded(hidden));
            }
            loader.vector(&format!("{module}.{name}.weight"), hidden)
        };
        Ok(Self {
            input_norm: norm(loader, "input_layernorm")?,
            q: loader.linear(&format!("{attention}.q_proj"), [q_size, hidden], qkv_bias)?,
            k: loader.linear(&format!("{attention}.k_proj"), [kv_size, hidden], qkv_bias)?,
            v: loader.linear(&format!("{attention}.v_proj"), [kv_size, hidden], qkv_bias)?,
            o: loader.linear(&format!("{attention}.o_proj"), [hidden, q_size], o_bias)?,
            qk_norm: if config.qk_norm {
                Some([
                    loader.vector(&format!("{attention}.q_norm.weight"), config.head_dim)?,
                    loader.vector(&format!("{attention}.k_norm.weight"), config.head_dim)?,
                ])
            } else {
                None
            },
            post_norm: norm(loader, "post_attention_layernorm")?,
            router: mixture
                .map(|m| {
                    let name = format!("{module}.{block}.gate.weight");
                    loader.router(&name, [m.n_experts, hidden])
                })
                .transpose()?,
            mlps: match mixture {
                None => {
                    let shape = [config.intermediate_size, hidden];
                    let mlp = format!("{module}.mlp");
                    vec![Mlp::load(&mlp, MLP_SITES, shape, config.mlp_bias, loader)?]
                }
                Some(m) => (0..m.n_experts)
                    .map(|expert| {
                        let mlp = format!("{module}.{block}.experts.{expert}");
                        Mlp::load(&mlp, sites, [m.expert_size, hidden], false, loader)
                    })
                    .collect::<Result<_>>()?,
            },
        })
    }
}

impl<L> Mlp<L> {
    /// A network of shape `[width, hidden_size]`.
    fn load<V, T>(
        module: &str,
        [gate, up, down]: [&str; 3],
        [width, hidden]: [usize; 2],
        bias: bool,
        loader: &mut impl Loader<Linear = L, Vector = V, Table = T>,
    ) -> Result<Self> {
        Ok(Self {
            gate: loader.linear(&format!("{module}.{gate}"), [width, hidden], bias)?,
            up: loader.linear(&format!("{module}.{up}"), [width, hidden], bias)?,
            down: loader.linear(&format!("{module}.{down}"), [hidden, width], bias)?,
        })
    }
}

/// A tensor that a checkpoint of some configuration has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Every tensor of a checkpoint of this configuration, in the order of the
/// forward pass.
pub fn tensor_specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = List(Vec::new());
    match Decoder::load(config, &mut list) {
        Ok(_) => list.0,
        Err(_) => unreachable!("listing names cannot fail"),
    }
}

struct List(Vec<TensorSpec>);

impl List {
    fn push(&mut self, name: String, role: Role, shape: Vec<usize>) -> Result<()> {
        self.0.push(TensorSpec { name, role, shape });
        Ok(())
    }
}

impl Loader for List {
    type Linear = ();
    type Vector = ();
    type Table = ();

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<()> {
        self.push(format!("{module}.weight"), Role::Linear, shape.to_vec())?;
        if bias { self.vector(&format!("{module}.bias"), shape[0]) } else { Ok(()) }
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<()> {
        self.push(name.to_owned(), Role::Vector, vec![len])
    }

    fn folded(&mut self, _: usize) {}

    fn router(&mut self, name: &str, shape: [usize; 2]) -> Result<()> {
        self.push(name.to_owned(), Role::Vector, shape.to_vec())
    }

    fn table(&mut self, name: &str, role: Role, shape: [usize; 2]) -> Result<()> {
        self.push(name.to_owned(), role, shape.to_vec())
    }
}
