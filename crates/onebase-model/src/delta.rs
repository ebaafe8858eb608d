use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use onebase_codec::{CodecSpec, DeltaLinear};
use onebase_format::Digest;
use onebase_format::artifact::{Artifact, CodecRecord};
use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef};

use crate::{Error, Result};

/// Nodes that tenants of a family share, in memory once for all of them, for as long as one
/// of them is.
#[derive(Default)]
pub(crate) struct NodeCache(Mutex<BTreeMap<(Digest, String), Weak<dyn DeltaLinear>>>);

impl std::fmt::Debug for NodeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeCache")
    }
}

impl NodeCache {
    /// Forgets nodes that nobody has any more.
    pub(crate) fn clean(&self) {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.retain(|_, node| node.strong_count() > 0);
    }

    fn get(
        &self,
        node: Digest,
        tensor: &str,
        load: impl FnOnce() -> Result<Box<dyn DeltaLinear>>,
    ) -> Result<Arc<dyn DeltaLinear>> {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (node, tensor.to_owned());
        if let Some(known) = nodes.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let loaded: Arc<dyn DeltaLinear> = load()?.into();
        nodes.insert(key, Arc::downgrade(&loaded));
        Ok(loaded)
    }
}

/// A node on a tenant's path at a site, and what each of its rows is multiplied by.
#[derive(Clone)]
pub(crate) struct GainedNode {
    pub(crate) node: Arc<dyn DeltaLinear>,
    /// `[out_features]`; 1 where there are none.
    pub(crate) gains: Option<Vec<f32>>,
}

/// The delta of a tenant of a family at one site: `Σ diag(gains) C` over the nodes on its path.
pub(crate) struct PathDelta {
    shape: [usize; 2],
    pub(crate) nodes: Vec<GainedNode>,
}

/// The delta of a site as it is stored.
pub(crate) enum Stored {
    /// Of the tenant's own.
    Own(Box<dyn DeltaLinear>),
    /// In nodes of a family.
    Path(PathDelta),
}

impl Stored {
    pub(crate) fn into_linear(self) -> Box<dyn DeltaLinear> {
        match self {
            Stored::Own(delta) => delta,
            Stored::Path(path) => Box::new(path),
        }
    }

    pub(crate) fn as_linear(&self) -> &dyn DeltaLinear {
        match self {
            Stored::Own(delta) => delta.as_ref(),
            Stored::Path(path) => path,
        }
    }
}

/// Adds to rows of `y`, `[n_rows, out_features]`, those of a node's product times the gains.
pub(crate) fn add_gained(gains: &[f32], product: &[f32], y: &mut [f32]) {
    let n = gains.len().max(1);
    for (y, product) in y.chunks_mut(n).zip(product.chunks(n)) {
        for ((y, product), gain) in y.iter_mut().zip(product).zip(gains) {
            *y += gain * product;
        }
    }
}

impl DeltaLinear for PathDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        for GainedNode { node, gains } in &self.nodes {
            match gains {
                None => node.add_to(backend, x, y),
                Some(gains) => add_gained(gains, &product(&**node, backend, x), y.data()),
            }
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let n_cols = self.shape[1].max(1);
        let mut values = vec![0.0; out.len()];
        out.fill(0.0);
        for GainedNode { node, gains } in &self.nodes {
            node.write_rows(rows.clone(), &mut values);
            for ((row, out), values) in
                rows.clone().zip(out.chunks_mut(n_cols)).zip(values.chunks(n_cols))
            {
                let gain = gains.as_ref().map_or(1.0, |gains| gains[row]);
                out.iter_mut().zip(values).for_each(|(out, v)| *out += gain * v);
            }
        }
    }

    fn resident_bytes(&self) -> usize {
        let bytes = |n: &GainedNode| {
            n.node.resident_bytes() + n.gains.as_ref().map_or(0, |g| size_of_val(g.as_slice()))
        };
        self.nodes.iter().map(bytes).sum()
    }
}

/// `x Cᵀ`, `[n_rows, out_features]`.
pub(crate) fn product(node: &dyn DeltaLinear, backend: Backend, x: MatrixRef<'_>) -> Vec<f32> {
    let (n_rows, n_out) = (x.n_rows(), node.shape()[0]);
    let mut product = vec![0.0; n_rows * n_out];
    let Ok(mut y) = MatrixMut::new(&mut product, n_rows, n_out) else {
        unreachable!("the product was sized for it")
    };
    node.add_to(backend, x, &mut y);
    product
}

/// The delta of a tensor of an artifact, ready to use; `None` when it is not stored as one.
///
/// # Errors
/// When a part is missing or not what the codec wrote.
pub fn load_delta(artifact: &Artifact, tensor: &str) -> Result<Option<Box<dyn DeltaLinear>>> {
    let stored = stored_delta(artifact, tensor, &NodeCache::default())?;
    Ok(stored.map(Stored::into_linear))
}

/// [`load_delta`] that takes nodes from a cache.
pub(crate) fn stored_delta(
    artifact: &Artifact,
    tensor: &str,
    cache: &NodeCache,
) -> Result<Option<Stored>> {
    let prepare = |codec: &CodecRecord, delta: EncodedDelta| {
        CodecSpec::from_record(&codec.name, codec.version, &codec.options)
            .and_then(|spec| spec.prepare(delta))
            .map_err(|source| Error::Delta {
                path: artifact.dir().to_owned(),
                tensor: tensor.to_owned(),
                source,
            })
    };
    if let Some((codec, delta)) = artifact.delta(tensor)? {
        return Ok(Some(Stored::Own(prepare(codec, delta)?)));
    }
    let Some(path) = artifact.path(tensor)? else { return Ok(None) };
    let Some(shape) = artifact.record(tensor)?.delta_shape() else { return Ok(None) };
    let mut nodes = Vec::new();
    for part in path {
        let load = || prepare(part.codec, artifact.node_delta(tensor, &part)?);
        let node = cache.get(part.node, tensor, load)?;
        if node.shape() != shape {
            return Err(Error::Shape {
                path: artifact.dir().to_owned(),
                tensor: tensor.to_owned(),
                expected: shape.to_vec(),
                got: node.shape().to_vec(),
            });
        }
        nodes.push(GainedNode { node, gains: part.gains });
    }
    Ok(Some(Stored::Path(PathDelta { shape, nodes })))
}
