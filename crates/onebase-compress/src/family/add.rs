use std::collections::{BTreeMap, BTreeSet};

use half::f16;
use onebase_codec::rqt::{
    MAX_LEAF_BITS, Residual, Rqt, SitePath, expected_error, fitted_gains, path_energy,
};
use onebase_codec::{CodecSpec, DeltaLinear, DeltaSource as _, Kind};
use onebase_format::artifact::{
    Artifact, ArtifactWriter, BaseRecord, CodecRecord, FileRecord, PathPart, Role, part_name,
};
use onebase_format::family::{Family, FamilyManifest, NodeRecord};
use onebase_format::{Digest, TensorEntry, TensorWriter};
use onebase_tensor::EncodedDelta;
use serde::Serialize;

use super::build::{run, squared_error};
use crate::compress::{codec_record, put_side_files, put_tensor, same_bytes};
use crate::model_card::model_card;
use crate::pair::TensorDelta;
use crate::{Error, Member, Plan, Progress, Result, TablePlan, VectorPlan};

/// What another node on the way must explain of a delta, relatively: each is read whenever
/// the tenant is.
const WORTH_A_NODE: f64 = 0.02;

/// Bits of codes where there is nobody to be as good as.
const BITS_ALONE: usize = 4;

/// Times that gains and codes of its own are fitted to each other.
const ROUNDS: usize = 2;

/// A tenant that was added.
#[derive(Clone, Debug, Serialize)]
pub struct Added {
    /// Its name.
    pub name: String,
    /// The nodes of others on its path.
    pub nodes: Vec<String>,
    /// The share of its delta's energy that they leave.
    pub left: f64,
    /// The codec of what it has of its own, if anything.
    pub leaf: Option<String>,
    /// The relative squared error of its linear sites' delta.
    pub error: f64,
}

/// Adds a fine-tune to a family: it takes the nodes of others that hold most of it, with
/// gains of its own, and gets codes of its own for what they leave. Nothing that is there
/// changes.
///
/// Without `leaf` its own codes have the fewest bits with which it is expected to be as good
/// as the tenants that are there are on average.
///
/// # Errors
/// When the base is another one, the name is taken, something cannot be read, or the family
/// cannot be written; it is then as it was.
pub fn add_to_family(
    family: &Family,
    member: &Member,
    leaf: Option<CodecSpec>,
    tables: &TablePlan,
    vectors: &VectorPlan,
    progress: &dyn Progress,
) -> Result<Added> {
    let change = family.change()?;
    let folder = family.tenant_folder(&member.name)?;
    if folder.exists() {
        return Err(Error::TwoTenants { name: member.name.clone() });
    }
    let tenants = family.tenants()?.into_iter().map(|name| Ok(family.tenant(&name)?));
    let tenants = tenants.collect::<Result<Vec<_>>>()?;
    tenants.iter().try_for_each(Artifact::check_files)?;
    match tenants.first() {
        Some(tenant) => tenant.check_base(member.pair.base())?,
        None => check_base(family, member)?,
    }
    let adding = Adding { member, sites: sites(member)?, nodes: Nodes::of(&tenants)?, progress };
    progress.begin(2 * member.pair.fine_tune().size_bytes());
    let (nodes, left, energy) = adding.best_path()?;
    let leaf = match leaf {
        Some(leaf) => Some(leaf),
        None => default_leaf(change.manifest(), family, left)?,
    };
    let file = match &leaf {
        Some(leaf) => {
            let path = change.new_node_path(0);
            Some(TensorWriter::create(&path, &adding.entries(leaf)?)?)
        }
        None => None,
    };
    let (sites, file, error) = adding.encode(&nodes, leaf.as_ref(), file)?;
    let error = if energy > 0.0 { error / energy } else { 0.0 };
    let mut records: Vec<FileRecord> =
        nodes.iter().map(|n| adding.nodes.files[n].clone()).collect();
    let mut manifest = change.manifest().clone();
    if let Some((bytes, blake3)) = file.map(TensorWriter::finish).transpose()? {
        change.name_node(0, blake3)?;
        records.push(FileRecord { bytes, blake3 });
        let errors = BTreeMap::from([(member.name.clone(), error)]);
        let bits = leaf.as_ref().map_or(0.0, |leaf| leaf_bits(leaf, bytes, adding.n_weights()));
        manifest.nodes.insert(blake3, NodeRecord { bits, errors });
    }
    let written = adding.write(&nodes, &records, leaf.as_ref(), &sites, tables, vectors, &folder);
    if written.is_err() {
        // The error that led here is the one to report.
        let _ = change.remove_unnamed();
    }
    written?;
    change.set_manifest(&manifest)?;
    Ok(Added {
        name: member.name.clone(),
        nodes: nodes.iter().map(Digest::to_string).collect(),
        left,
        leaf: leaf.map(|leaf| leaf.to_string()),
        error,
    })
}

/// Bits of a node that is one codec's: of its codes where these are plain, else of all that its
/// file holds, over the weights of all linear sites.
#[allow(clippy::cast_precision_loss)]
pub(super) fn leaf_bits(leaf: &CodecSpec, file_bytes: u64, n_weights: usize) -> f64 {
    match leaf.bits_option().map(|option| (option.name, option.kind)) {
        Some((name, Kind::Int { .. })) => leaf.options().int(name) as f64,
        _ => 8.0 * file_bytes as f64 / n_weights.max(1) as f64,
    }
}

/// Checks that a fine-tune's base is that of a family without tenants.
fn check_base(family: &Family, member: &Member) -> Result<()> {
    let base = member.pair.base();
    let names: Vec<&str> = member.pair.specs().iter().map(|spec| spec.name.as_str()).collect();
    let got = BaseRecord::new(&base.name(), names.iter().copied().zip(base.digests(&names)?));
    let expected = family.manifest().base.clone();
    if got.blake3 == expected.blake3 {
        return Ok(());
    }
    Err(Error::OtherFamilyBase { family: family.dir().to_owned(), expected, got })
}

/// The codes of the fewest bits with which what is left is as good as the other tenants are.
fn default_leaf(
    manifest: &FamilyManifest,
    family: &Family,
    left: f64,
) -> Result<Option<CodecSpec>> {
    let mut options = manifest.codec.options.clone();
    options.shift_remove("leaf");
    let rqt = Rqt::new(&options).map_err(|source| Error::Codec {
        path: family.dir().to_owned(),
        tensor: "all".to_owned(),
        source,
    })?;
    // The last node on a tenant's path has its least error.
    let mut finals: BTreeMap<&str, f64> = BTreeMap::new();
    for (tenant, error) in manifest.nodes.values().flat_map(|node| &node.errors) {
        let least = finals.entry(tenant).or_insert(f64::INFINITY);
        *least = least.min(*error);
    }
    #[allow(clippy::cast_precision_loss)]
    let mean = finals.values().sum::<f64>() / finals.len().max(1) as f64;
    let group_size = rqt.fit().group_size;
    if finals.is_empty() {
        return Ok(rqt.node_codec(BITS_ALONE).ok());
    }
    let is_enough = |bits: &usize| left * expected_error(*bits, group_size) <= mean;
    let bits = (0..MAX_LEAF_BITS).find(is_enough).unwrap_or(MAX_LEAF_BITS);
    Ok(rqt.node_codec(bits).ok())
}

/// The nodes of a family's tenants.
struct Nodes<'a> {
    /// By digest.
    files: BTreeMap<Digest, FileRecord>,
    /// The paths of tenants and their beginnings, each once.
    paths: BTreeSet<Vec<Digest>>,
    /// By node and tensor, where its codes are.
    sites: BTreeMap<(Digest, String), (&'a Artifact, PathPart<'a>)>,
}

impl<'a> Nodes<'a> {
    fn of(tenants: &'a [Artifact]) -> Result<Self> {
        let mut nodes =
            Self { files: BTreeMap::new(), paths: BTreeSet::new(), sites: BTreeMap::new() };
        for tenant in tenants {
            let manifest = tenant.manifest();
            let way: Vec<Digest> = manifest.nodes.iter().map(|node| node.blake3).collect();
            nodes.paths.extend((1..=way.len()).map(|n| way[..n].to_vec()));
            nodes.files.extend(manifest.nodes.iter().map(|node| (node.blake3, node.clone())));
            for tensor in manifest.tensors.keys() {
                for part in tenant.path(tensor)?.into_iter().flatten() {
                    nodes.sites.insert((part.node, tensor.clone()), (tenant, part));
                }
            }
        }
        Ok(nodes)
    }

    /// The codes of a node at a site, ready to use; `None` where it has none there.
    fn load(
        &self,
        node: Digest,
        tensor: &str,
    ) -> Result<Option<(Box<dyn DeltaLinear>, &CodecRecord)>> {
        let Some((tenant, part)) = self.sites.get(&(node, tensor.to_owned())) else {
            return Ok(None);
        };
        let delta = tenant.node_delta(tensor, part)?;
        let CodecRecord { name, version, options } = part.codec;
        let delta = CodecSpec::from_record(name, *version, options).and_then(|c| c.prepare(delta));
        let delta = delta.map_err(|source| Error::Codec {
            path: tenant.dir().to_owned(),
            tensor: tensor.to_owned(),
            source,
        })?;
        Ok(Some((delta, part.codec)))
    }
}

/// What a new tenant has at one linear site.
struct AddedSite {
    /// Of the nodes of its path, by position, their codecs.
    nodes: Vec<(usize, CodecRecord)>,
    gains: Vec<Vec<f16>>,
    has_leaf: bool,
}

/// The linear sites at which a fine-tune differs from the base, by position, and its deltas.
fn sites(member: &Member) -> Result<Vec<(usize, TensorDelta<'_>)>> {
    let mut sites = Vec::new();
    for (index, spec) in member.pair.specs().iter().enumerate() {
        if spec.role != Role::Linear {
            continue;
        }
        let delta = member.pair.delta(&spec.name)?;
        if !same_bytes(&delta.base, &delta.fine_tune)? {
            sites.push((index, delta));
        }
    }
    Ok(sites)
}

struct Adding<'a> {
    member: &'a Member,
    sites: Vec<(usize, TensorDelta<'a>)>,
    nodes: Nodes<'a>,
    progress: &'a dyn Progress,
}

impl<'a> Adding<'a> {
    /// Weights of all linear sites.
    fn n_weights(&self) -> usize {
        let specs = self.member.pair.specs().iter().filter(|spec| spec.role == Role::Linear);
        specs.map(|spec| spec.shape.iter().product::<usize>()).sum()
    }

    fn name(&self, index: usize) -> &str {
        &self.member.pair.specs()[index].name
    }

    /// The path that leaves least, each node worth what it costs, the share that it leaves, and
    /// the energy of all deltas.
    fn best_path(&self) -> Result<(Vec<Digest>, f64, f64)> {
        let paths: Vec<&Vec<Digest>> = self.nodes.paths.iter().collect();
        let (mut total, mut left) = (0.0, vec![0.0; paths.len()]);
        for (index, delta) in &self.sites {
            let tensor = self.name(*index);
            self.progress.tensor(tensor);
            let mut known = Vec::new();
            for node in self.nodes.files.keys() {
                if let Some((loaded, _)) = self.nodes.load(*node, tensor)? {
                    known.push((*node, loaded));
                }
            }
            let position = |node: &Digest| known.iter().position(|(other, _)| other == node);
            let ways = paths.iter().map(|path| path.iter().filter_map(position).collect());
            let ways: Vec<Vec<usize>> = ways.collect();
            let loaded: Vec<&dyn DeltaLinear> = known.iter().map(|(_, node)| &**node).collect();
            let (all, of_paths) =
                path_energy(delta, &loaded, &ways).map_err(|e| delta.explain(e))?;
            total += all;
            left.iter_mut().zip(of_paths).for_each(|(sum, own)| *sum += own);
            self.progress.advance(delta.fine_tune.size_bytes() as u64);
        }
        let mut best = (1.0, Vec::new(), 1.0);
        for (path, left) in paths.into_iter().zip(left) {
            let left = if total > 0.0 { left / total } else { 1.0 };
            #[allow(clippy::cast_precision_loss)]
            let cost = left + WORTH_A_NODE * path.len() as f64;
            if cost < best.0 {
                best = (cost, path.clone(), left);
            }
        }
        Ok((best.1, best.2, total))
    }

    /// What the file of the tenant's own codes holds.
    fn entries(&self, leaf: &CodecSpec) -> Result<Vec<TensorEntry>> {
        let mut entries = Vec::new();
        for (index, delta) in &self.sites {
            let Some(parts) = leaf.parts(delta.shape()) else {
                return Err(Error::UnknownSize { codec: leaf.to_string() });
            };
            entries.extend(parts.into_iter().map(|part| TensorEntry {
                name: part_name(self.name(*index), part.name),
                dtype: part.dtype,
                shape: part.shape,
            }));
        }
        Ok(entries)
    }

    /// Encodes every site, writes the tenant's own codes, and gives the squared error.
    #[allow(clippy::type_complexity)]
    fn encode(
        &self,
        way: &[Digest],
        leaf: Option<&CodecSpec>,
        mut file: Option<TensorWriter>,
    ) -> Result<(BTreeMap<usize, AddedSite>, Option<TensorWriter>, f64)> {
        let mut sites = BTreeMap::new();
        let mut error = 0.0;
        for (index, delta) in &self.sites {
            let tensor = self.name(*index);
            self.progress.tensor(tensor);
            let mut loaded = Vec::new();
            let mut nodes = Vec::new();
            for (at, node) in way.iter().enumerate() {
                if let Some((delta, codec)) = self.nodes.load(*node, tensor)? {
                    loaded.push(delta);
                    nodes.push((at, codec.clone()));
                }
            }
            let loaded: Vec<&dyn DeltaLinear> = loaded.iter().map(|node| &**node).collect();
            let fitted = fit(delta, &loaded, leaf).map_err(|e| delta.explain(e))?;
            error += fitted.error;
            if let (Some(file), Some(own)) = (&mut file, fitted.leaf) {
                for part in own.parts.values() {
                    file.write(&part.data().to_le_bytes())?;
                }
            }
            let has_leaf = leaf.is_some();
            sites.insert(*index, AddedSite { nodes, gains: fitted.gains, has_leaf });
            self.progress.advance(delta.fine_tune.size_bytes() as u64);
        }
        Ok((sites, file, error))
    }

    #[allow(clippy::too_many_arguments)]
    fn write(
        &self,
        way: &[Digest],
        records: &[FileRecord],
        leaf: Option<&CodecSpec>,
        sites: &BTreeMap<usize, AddedSite>,
        tables: &TablePlan,
        vectors: &VectorPlan,
        target: &std::path::Path,
    ) -> Result<()> {
        let pair = &self.member.pair;
        let mut writer = ArtifactWriter::open(target, &run(pair)?, true)?;
        let rest = leaf.cloned().or_else(|| CodecSpec::new("rtn", &serde_json::Map::new()).ok());
        let Some(rest) = rest else { unreachable!("rtn is a codec") };
        let rest = Plan::new(rest, tables.clone(), vectors.clone());
        for (index, spec) in pair.specs().iter().enumerate() {
            let base = pair.base().tensor(&spec.name)?;
            let fine_tune = pair.fine_tune().tensor(&spec.name)?;
            let Some(site) = sites.get(&index) else {
                // Of linear sites, those with the base's weights.
                put_tensor(index, spec, &rest, None, &mut writer, base, fine_tune)?;
                continue;
            };
            let origin = pair.origin(index, base.digest()?, fine_tune.digest()?)?;
            let nodes = site.nodes.iter().map(|(at, codec)| (*at, codec.clone(), true));
            let own = leaf.filter(|_| site.has_leaf);
            let own = own.map(|leaf| (way.len(), codec_record(leaf), false));
            writer.put_path(origin, nodes.chain(own).collect(), &site.gains)?;
        }
        put_side_files(pair, &mut writer)?;
        writer.finish_with(records, model_card)?;
        Ok(())
    }
}

/// A delta as gains at nodes and codes of its own.
struct Fitted {
    gains: Vec<Vec<f16>>,
    leaf: Option<EncodedDelta>,
    error: f64,
}

/// Fits gains and codes to each other.
fn fit(
    delta: &TensorDelta<'_>,
    nodes: &[&dyn DeltaLinear],
    leaf: Option<&CodecSpec>,
) -> onebase_codec::Result<Fitted> {
    let mut gains = fitted_gains(delta, nodes)?;
    let Some(codec) = leaf else {
        let path = SitePath { nodes: nodes.to_vec(), gains };
        let (error, _) = path_energy(&Residual { delta, path: &path }, &[], &[])?;
        return Ok(Fitted { gains: path.gains, leaf: None, error });
    };
    let mut best: Option<Fitted> = None;
    for _ in 0..ROUNDS {
        let path = SitePath { nodes: nodes.to_vec(), gains };
        let residual = Residual { delta, path: &path };
        let own = codec.encode(&residual)?;
        let error = squared_error(&residual, codec, &own)?;
        // What the codes of its own leave is what gains are fitted to next.
        let decoded = codec.prepare(own.clone())?;
        let held =
            SitePath { nodes: vec![&*decoded], gains: vec![vec![f16::ONE; decoded.shape()[0]]] };
        gains = fitted_gains(&Residual { delta, path: &held }, nodes)?;
        let is_better = best.as_ref().is_none_or(|best| error < best.error);
        if is_better {
            best = Some(Fitted { gains: path.gains, leaf: Some(own), error });
        }
        if nodes.is_empty() {
            break;
        }
    }
    match best {
        Some(best) => Ok(best),
        None => unreachable!("there is a round"),
    }
}
