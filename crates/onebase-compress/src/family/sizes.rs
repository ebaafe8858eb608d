use std::collections::{BTreeMap, BTreeSet};

use onebase_format::artifact::Artifact;
use onebase_format::family::Family;
use onebase_format::{Checkpoint, Digest};
use serde::Serialize;

use crate::{Progress, Result, Verified, verify};

/// What a family takes on disk, and what of it each tenant does. Bits are effective bits per
/// weight of the linear sites, all bytes of their files counted.
#[derive(Clone, Debug, Serialize)]
pub struct FamilyReport {
    /// Bytes of all files of the family.
    pub total_bytes: u64,
    /// Bytes of the nodes and the tenants' files of linear sites.
    pub linear_bytes: u64,
    /// All bits over all tenants' weights.
    pub amortised_bpw: f64,
    /// With an equal share of the base's 16 or 32 bits.
    pub amortised_bpw_with_base: Option<f64>,
    /// The nodes, those of several tenants first.
    pub nodes: Vec<NodeReport>,
    /// By name.
    pub tenants: Vec<TenantReport>,
}

/// A node of a family.
#[derive(Clone, Debug, Serialize)]
pub struct NodeReport {
    /// Its digest.
    pub blake3: Digest,
    /// Bytes of its file.
    pub bytes: u64,
    /// Bits of its codes, a mean over all linear sites, where known.
    pub bits: Option<f64>,
    /// The tenants that have it on their path now.
    pub tenants: Vec<String>,
    /// The relative squared error down to it of those that it was written for.
    pub errors: BTreeMap<String, f64>,
}

/// What one tenant takes.
#[derive(Clone, Debug, Serialize)]
pub struct TenantReport {
    /// Its name.
    pub name: String,
    /// Digests of the nodes on its path, as they are added.
    pub nodes: Vec<Digest>,
    /// Bits of what is read for it alone.
    pub path_bpw: f64,
    /// Bits of what nobody else has.
    pub marginal_bpw: f64,
    /// Bits of its own and an equal share of each node; these add up to the family's.
    pub attributed_bpw: f64,
    /// Bytes of its own files, without nodes.
    pub own_bytes: u64,
}

/// Reads what a family takes. `base` is the base's bits per weight, if known.
///
/// # Errors
/// When a tenant cannot be opened.
#[allow(clippy::cast_precision_loss)]
pub fn family_report(family: &Family, base: Option<f64>) -> Result<FamilyReport> {
    let mut artifacts: Vec<(String, Artifact)> = Vec::new();
    for name in family.tenants()? {
        let artifact = family.tenant(&name)?;
        artifacts.push((name, artifact));
    }
    let mut users: BTreeMap<Digest, (u64, Vec<String>)> = BTreeMap::new();
    for (name, artifact) in &artifacts {
        for node in &artifact.manifest().nodes {
            let entry = users.entry(node.blake3).or_insert((node.bytes, Vec::new()));
            entry.1.push(name.clone());
        }
    }
    let manifest_bytes = std::fs::metadata(family.dir().join(onebase_format::family::FAMILY_FILE));
    let mut total_bytes = manifest_bytes.map_or(0, |metadata| metadata.len());
    let node_bytes: u64 = users.values().map(|(bytes, _)| *bytes).sum();
    total_bytes += node_bytes;
    let mut linear_bytes = node_bytes;
    let mut n_weights = 0;
    let mut tenants = Vec::new();
    for (name, artifact) in &artifacts {
        let (manifest, sizes) = (artifact.manifest(), artifact.sizes());
        let on_way: u64 = manifest.nodes.iter().map(|node| node.bytes).sum();
        let own_linear = sizes.linear_bytes - on_way;
        let weights = sizes.n_weights_linear.max(1);
        let nodes: Vec<Digest> = manifest.nodes.iter().map(|node| node.blake3).collect();
        let bits = |bytes: f64| 8.0 * bytes / weights as f64;
        let distinct: BTreeSet<&Digest> = nodes.iter().collect();
        let (mut marginal, mut attributed) = (own_linear as f64, own_linear as f64);
        for node in distinct {
            let Some((bytes, names)) = users.get(node) else { continue };
            attributed += *bytes as f64 / names.len() as f64;
            if names.len() == 1 {
                marginal += *bytes as f64;
            }
        }
        total_bytes += sizes.total_bytes - on_way;
        linear_bytes += own_linear;
        n_weights += sizes.n_weights_linear;
        tenants.push(TenantReport {
            name: name.clone(),
            nodes,
            path_bpw: sizes.effective_bpw_linear(),
            marginal_bpw: bits(marginal),
            attributed_bpw: bits(attributed),
            own_bytes: sizes.total_bytes - on_way,
        });
    }
    let known = &family.manifest().nodes;
    let mut nodes: Vec<NodeReport> = users
        .into_iter()
        .map(|(blake3, (bytes, tenants))| {
            let record = known.get(&blake3);
            let errors = record.map(|record| record.errors.clone()).unwrap_or_default();
            NodeReport { bits: record.map(|record| record.bits), errors, blake3, bytes, tenants }
        })
        .collect();
    nodes.sort_by(|a, b| {
        b.tenants.len().cmp(&a.tenants.len()).then_with(|| a.tenants.cmp(&b.tenants))
    });
    let amortised_bpw = 8.0 * linear_bytes as f64 / n_weights.max(1) as f64;
    let share = base.map(|bits| amortised_bpw + bits / artifacts.len().max(1) as f64);
    Ok(FamilyReport {
        total_bytes,
        linear_bytes,
        amortised_bpw,
        amortised_bpw_with_base: share,
        nodes,
        tenants,
    })
}

/// [`verify`] of every tenant of a family.
///
/// # Errors
/// When something is not as it was written; of a node, the error names all its tenants.
pub fn verify_family(
    base: &Checkpoint,
    family: &Family,
    progress: &dyn Progress,
) -> Result<Vec<(String, Verified)>> {
    let mut verified = Vec::new();
    for name in family.tenants()? {
        let artifact = family.tenant(&name)?;
        verified.push((name, verify(base, &artifact, progress)?));
    }
    Ok(verified)
}
