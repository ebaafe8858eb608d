use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use onebase_codec::rqt::{EncodedTree, Residual, SiteNode, SitePath, encode_tree};
use onebase_codec::{CodecSpec, DeltaLinear, DeltaSource, read_finite};
use onebase_format::artifact::{ArtifactWriter, BaseRecord, FileRecord, Run, Shard, StoredTensor};
use onebase_format::family::{
    FAMILY_FORMAT, FAMILY_VERSION, FamilyManifest, NODES_FOLDER, NodeRecord, TENANTS_FOLDER,
    node_name, tenant_folder, write_family,
};
use onebase_format::{Digest, StagedFolder, TensorWriter};
use onebase_tensor::EncodedDelta;
use rayon::prelude::*;
use serde_json::Map;

use super::add::leaf_bits;
use super::plan::SitePlan;
use crate::compress::{TOOL, put_side_files, put_tensor};
use crate::model_card::model_card;
use crate::pair::TensorDelta;
use crate::{FamilyPlan, Member, Progress, Relatives, Result};

/// Rows whose error is measured at a time.
const BLOCK_ROWS: usize = 64;

/// What is written of one site.
struct EncodedSite {
    /// The parts of each node of the site.
    nodes: Vec<EncodedDelta>,
    /// Of each node and member, the gains; none where it is not shared.
    gains: Vec<Vec<Vec<f16>>>,
    /// Of each node and member, the squared error down to it.
    errors: Vec<Vec<f64>>,
}

/// Writes a family into the folder `target`, which must not exist.
///
/// Every delta is read once by blocks of rows of all fine-tunes, each tensor once more for
/// its digest. The same checkpoints and options give the same bytes on any number of threads.
///
/// # Errors
/// When something cannot be read or written; nothing is under the folder's name then.
pub fn build_family(
    members: &[Member],
    relatives: &Relatives,
    plan: &FamilyPlan,
    target: &Path,
    progress: &dyn Progress,
) -> Result<FamilyManifest> {
    let Some(first) = members.first() else { unreachable!("a family has a fine-tune") };
    let specs = first.pair.specs();
    let folder = StagedFolder::create(target)?;
    let nodes_folder = folder.create_folder(NODES_FOLDER)?;
    folder.create_folder(TENANTS_FOLDER)?;
    let mut files = Vec::new();
    for node in 0..plan.nodes.len() {
        let path = nodes_folder.join(format!(".{node}.partial"));
        files.push(TensorWriter::create(&path, &plan.entries(node, specs)?)?);
    }
    let weights: Vec<f64> = relatives.roots().iter().map(|root| root * root).collect();
    let mut gains = vec![Vec::new(); members.len()];
    let mut errors = Errors::new(plan, members.len());
    for (site, known) in plan.sites.iter().zip(&relatives.sites) {
        let spec = &specs[site.index];
        progress.tensor(&spec.name);
        let deltas = members.iter().map(|member| member.pair.delta(&spec.name));
        let deltas = deltas.collect::<Result<Vec<_>>>()?;
        let encoded = encode_site(plan, site, &deltas, &weights)?;
        let energies: Vec<f64> = (0..members.len()).map(|i| known.gram.at(i, i)).collect();
        errors.add(plan, site, &encoded, &energies);
        for (at, (node, _)) in site.nodes.iter().enumerate() {
            for part in encoded.nodes[at].parts.values() {
                files[*node].write(&part.data().to_le_bytes())?;
            }
        }
        for (member, gains) in gains.iter_mut().enumerate() {
            let mut own = Vec::new();
            for ((node, _), of_node) in site.nodes.iter().zip(&encoded.gains) {
                let at = plan.nodes[*node].iter().position(|m| *m == member);
                own.extend(at.and_then(|at| of_node.get(at)).cloned());
            }
            gains.push(own);
        }
        let read: usize = deltas.iter().map(|delta| delta.fine_tune.size_bytes()).sum();
        progress.advance(read as u64);
    }
    let mut records = Vec::new();
    for (node, file) in files.into_iter().enumerate() {
        let (bytes, blake3) = file.finish()?;
        let from = nodes_folder.join(format!(".{node}.partial"));
        onebase_format::rename(&from, &nodes_folder.join(node_name(blake3)))?;
        records.push(FileRecord { bytes, blake3 });
    }
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let bases = first.pair.base().digests(&names)?;
    for (at, (member, gains)) in members.iter().zip(&gains).enumerate() {
        progress.tensor(&member.name);
        let tenant = Tenant { plan, at, member, bases: &bases, gains };
        tenant.write(&records, &tenant_folder(&folder.path(""), &member.name)?, progress)?;
    }
    let base = BaseRecord::new(&first.pair.base().name(), names.into_iter().zip(bases));
    let manifest = FamilyManifest {
        format: FAMILY_FORMAT.to_owned(),
        version: FAMILY_VERSION,
        tool: TOOL.to_owned(),
        base,
        codec: plan.codec_record(),
        similarity: relatives.similarity(),
        nodes: errors.records(plan, members, relatives, &records),
    };
    write_family(&folder.path(""), &manifest)?;
    folder.commit()?;
    Ok(manifest)
}

/// Encodes all nodes of a site.
fn encode_site(
    plan: &FamilyPlan,
    site: &SitePlan,
    deltas: &[TensorDelta<'_>],
    weights: &[f64],
) -> Result<EncodedSite> {
    let sources: Vec<&dyn DeltaSource> = deltas.iter().map(|delta| delta as _).collect();
    let planned: Vec<SiteNode> = site
        .nodes
        .iter()
        .filter(|(_, bits)| *bits > 0)
        .map(|(node, bits)| SiteNode { members: plan.nodes[*node].clone(), bits: *bits })
        .collect();
    let tree = encode_tree(&sources, weights, &planned, plan.options.rqt.fit())
        .map_err(|(member, error)| deltas[member].explain(error))?;
    let EncodedTree { nodes, gains, errors } = tree;
    let mut encoded = EncodedSite { nodes, gains, errors };
    if plan.options.leaf.is_none() {
        return Ok(encoded);
    }
    // Leaves come after all shared nodes, in the plan and here.
    let shared = encoded.nodes.iter().zip(&planned).map(|(delta, node)| {
        plan.codec(node.bits)?.prepare(delta.clone()).map_err(|e| deltas[0].explain(e))
    });
    let shared = shared.collect::<Result<Vec<Box<dyn DeltaLinear>>>>()?;
    for (node, _) in site.nodes.iter().filter(|(_, bits)| *bits == 0) {
        let member = plan.nodes[*node][0];
        let mut path = SitePath::default();
        for ((delta, node), gains) in shared.iter().zip(&planned).zip(&encoded.gains) {
            if let Some(at) = node.members.iter().position(|m| *m == member) {
                path.nodes.push(&**delta);
                path.gains.push(gains.get(at).cloned().unwrap_or_default());
            }
        }
        let residual = Residual { delta: &deltas[member], path: &path };
        let explain = |e| deltas[member].explain(e);
        let codec = plan.codec(0)?;
        let leaf = codec.encode(&residual).map_err(explain)?;
        let error = squared_error(&residual, &codec, &leaf).map_err(explain)?;
        encoded.nodes.push(leaf);
        encoded.gains.push(Vec::new());
        encoded.errors.push(vec![error]);
    }
    Ok(encoded)
}

/// What codes leave of a delta.
pub(super) fn squared_error(
    delta: &dyn DeltaSource,
    codec: &CodecSpec,
    encoded: &EncodedDelta,
) -> onebase_codec::Result<f64> {
    let decoded = codec.prepare(encoded.clone())?;
    let [n_rows, _] = delta.shape();
    let blocks: Vec<f64> = (0..n_rows.div_ceil(BLOCK_ROWS))
        .into_par_iter()
        .map(|block| {
            let rows = block * BLOCK_ROWS..n_rows.min((block + 1) * BLOCK_ROWS);
            let weights = read_finite(delta, rows.clone())?;
            let mut values = vec![0.0; weights.len()];
            decoded.write_rows(rows, &mut values);
            let pairs = weights.iter().zip(&values);
            Ok(pairs.map(|(w, v)| f64::from(w - v) * f64::from(w - v)).sum())
        })
        .collect::<onebase_codec::Result<_>>()?;
    Ok(blocks.iter().sum())
}

/// A tenant of a family that is being written.
struct Tenant<'a> {
    plan: &'a FamilyPlan,
    /// Its position.
    at: usize,
    member: &'a Member,
    /// Digests of the base's tensors.
    bases: &'a [Digest],
    /// By site of the plan, then node with gains.
    gains: &'a [Vec<Vec<f16>>],
}

impl Tenant<'_> {
    fn write(&self, nodes: &[FileRecord], target: &Path, progress: &dyn Progress) -> Result<()> {
        let pair = &self.member.pair;
        let run = run(pair)?;
        let mut writer = ArtifactWriter::open(target, &run, false)?;
        let own = self.plan.nodes_of(self.at);
        let rest = self.plan.rest();
        let sites = self.plan.sites.iter().zip(self.gains);
        let sites: BTreeMap<usize, _> = sites.map(|(site, g)| (site.index, (site, g))).collect();
        for (index, spec) in pair.specs().iter().enumerate() {
            let base = pair.base().tensor(&spec.name)?;
            let fine_tune = pair.fine_tune().tensor(&spec.name)?;
            let bytes = fine_tune.size_bytes() as u64;
            let Some((site, gains)) = sites.get(&index) else {
                put_tensor(index, spec, &rest, None, &mut writer, base, fine_tune)?;
                continue;
            };
            let origin = pair.origin(index, self.bases[index], fine_tune.digest()?)?;
            if site.unchanged[self.at] {
                writer.put(StoredTensor::unchanged(origin), &[])?;
            } else {
                writer.put_path(origin, self.plan.path(self.at, &own, site)?, gains)?;
            }
            progress.advance(bytes);
        }
        put_side_files(pair, &mut writer)?;
        let own: Vec<FileRecord> = own.into_iter().map(|node| nodes[node].clone()).collect();
        writer.finish_with(&own, model_card)?;
        Ok(())
    }
}

/// What is said of the writing of one tenant, which is thrown away when it is interrupted.
pub(super) fn run(pair: &crate::Pair) -> Result<Run> {
    Ok(Run {
        tool: TOOL.to_owned(),
        base: pair.base().name(),
        fine_tune: pair.fine_tune().name(),
        inputs: pair.fingerprint(false)?,
        options: Map::new(),
        calibration: None,
        n_tensors: pair.specs().len(),
        shard: Shard::WHOLE,
    })
}

/// Squared errors down to each node, of each fine-tune that has it on its path, over all sites.
struct Errors {
    /// By node, then fine-tune.
    sums: Vec<BTreeMap<usize, f64>>,
}

impl Errors {
    fn new(plan: &FamilyPlan, n_members: usize) -> Self {
        let mut sums = vec![BTreeMap::new(); plan.nodes.len()];
        for member in 0..n_members {
            for node in plan.nodes_of(member) {
                sums[node].insert(member, 0.0);
            }
        }
        Self { sums }
    }

    fn add(&mut self, plan: &FamilyPlan, site: &SitePlan, encoded: &EncodedSite, energies: &[f64]) {
        let mut left = energies.to_vec();
        for (node, sums) in self.sums.iter_mut().enumerate() {
            if let Some(at) = site.nodes.iter().position(|(at, _)| *at == node) {
                for (member, error) in plan.nodes[node].iter().zip(&encoded.errors[at]) {
                    left[*member] = *error;
                }
            }
            sums.iter_mut().for_each(|(member, sum)| *sum += left[*member]);
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn records(
        self,
        plan: &FamilyPlan,
        members: &[Member],
        relatives: &Relatives,
        files: &[FileRecord],
    ) -> BTreeMap<Digest, NodeRecord> {
        let mut records = BTreeMap::new();
        for (node, (sums, file)) in self.sums.into_iter().zip(files).enumerate() {
            let mut bits = 0.0;
            for site in &plan.sites {
                if let Some((_, own)) = site.nodes.iter().find(|(at, _)| *at == node) {
                    bits += (own * site.shape[0] * site.shape[1]) as f64;
                }
            }
            let relative = |(member, sum): (usize, f64)| {
                (members[member].name.clone(), sum / relatives.total.at(member, member))
            };
            let errors = sums.into_iter().map(relative).collect();
            let n_weights = relatives.n_weights();
            let bits = match &plan.options.leaf {
                Some(leaf) if bits == 0.0 => leaf_bits(leaf, file.bytes, n_weights),
                _ => bits / n_weights.max(1) as f64,
            };
            records.insert(file.blake3, NodeRecord { bits, errors });
        }
        records
    }
}
