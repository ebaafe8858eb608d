use std::collections::BTreeMap;
use std::path::Path;

use onebase_codec::{CodecSpec, SecondMoment};
use onebase_format::artifact::{
    ArtifactWriter, CodecRecord, Done, Manifest, Origin, Role, Run, Shard, Sizes, StoredTensor,
};
use onebase_format::{CONFIG_FILE, SIDE_FILES, Tensor};
use onebase_model::TensorSpec;
use onebase_tensor::EncodedDelta;
use serde_json::{Map, Value};

use crate::calibration::SequentialRun;
use crate::model_card::model_card;
use crate::pair::TensorDelta;
use crate::plan::encode;
use crate::{Error, Inputs, Pair, Plan, Progress, Result};

pub(crate) const TOOL: &str = concat!("onebase ", env!("CARGO_PKG_VERSION"));

/// Bytes compared or copied at a time.
const BLOCK: usize = 1 << 20;

/// How much of a fine-tune is compressed, and what is done with what an earlier process
/// has left.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The part of the tensors.
    pub shard: Shard,
    /// Throw away what an interrupted run has done, instead of going on with it.
    pub restart: bool,
}

impl Job {
    /// All of it, going on with what is there.
    pub const WHOLE: Self = Self { shard: Shard::WHOLE, restart: false };
}

/// Compresses a fine-tune into the folder `target`, which must not exist.
///
/// # Errors
/// As [`compress_part`].
pub fn compress(
    pair: &Pair,
    plan: &Plan,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(Manifest, Sizes)> {
    match compress_part(pair, plan, Job::WHOLE, target, progress)? {
        Some(written) => Ok(written),
        None => unreachable!("the whole is an artifact"),
    }
}

/// Compresses a fine-tune, or a shard of it, towards the folder `target`, which must not
/// exist. A process that is killed leaves what it has done beside that folder; the same
/// job goes on with it, and gives the same bytes as an undisturbed one. A shard ends there
/// too, for [`join`]: then there is no artifact yet.
///
/// # Errors
/// When something cannot be read, a weight is NaN or ∞, the fine-tune is the base, the plan
/// has statistics that a linear site's codec cannot use or that were altered, or a text to
/// measure inputs on that it cannot use, that a shard is to be made with or whose inputs are
/// no finite numbers, what is left
/// is of another run or of checkpoints that have changed since, or something
/// cannot be written. Nothing is under the folder's name then.
pub fn compress_part(
    pair: &Pair,
    plan: &Plan,
    job: Job,
    target: &Path,
    progress: &dyn Progress,
) -> Result<Option<(Manifest, Sizes)>> {
    plan.check_calibration()?;
    if job.shard != Shard::WHOLE {
        plan.check_any_order("a shard")?;
    }
    if !pair.is_changed()? {
        return Err(Error::NoChange { path: pair.fine_tune.dir().to_owned() });
    }
    let ours = pair.shard(job.shard)?;
    let sites = plan.sites.iter().map(|(site, codec)| (site.clone(), codec.to_string().into()));
    let run = Run {
        tool: TOOL.to_owned(),
        base: pair.base.name(),
        fine_tune: pair.fine_tune.name(),
        inputs: pair.fingerprint(job.shard != Shard::WHOLE)?,
        options: Map::from_iter([
            ("linear".to_owned(), plan.linear.to_string().into()),
            ("embeddings".to_owned(), plan.tables.to_string().into()),
            ("vectors".to_owned(), plan.vectors.to_string().into()),
            ("sites".to_owned(), Value::Object(sites.collect())),
        ]),
        calibration: plan.calibration.as_ref().map(Inputs::record),
        n_tensors: pair.specs.len(),
        shard: job.shard,
    };
    let mut writer = ArtifactWriter::open(target, &run, job.restart)?;
    let done = put_all(pair, plan, job.shard, ours, &mut writer, progress);
    // What is done is worth keeping, but where the fine-tune can only be another one then.
    if !matches!(done, Err(Error::NotFinite { .. } | Error::InputNotFinite { .. })) {
        writer.keep();
    }
    done?;
    if job.shard == Shard::WHOLE {
        return Ok(Some(writer.finish(model_card)?));
    }
    writer.finish_shard()?;
    Ok(None)
}

/// Joins the shards that were compressed towards `target` to the artifact, as
/// [`onebase_format::artifact::join`].
///
/// # Errors
/// As there.
pub fn join(target: &Path) -> Result<(Manifest, Sizes)> {
    Ok(onebase_format::artifact::join(target, model_card)?)
}

fn put_all(
    pair: &Pair,
    plan: &Plan,
    shard: Shard,
    ours: Vec<usize>,
    writer: &mut ArtifactWriter,
    progress: &dyn Progress,
) -> Result<()> {
    let size = |index: &usize| Ok(pair.fine_tune.tensor(&pair.specs[*index].name)?.size_bytes());
    let total: Result<Vec<usize>> = ours.iter().map(size).collect();
    let done: BTreeMap<usize, Done> = writer.done().map(|done| (done.index, done)).collect();
    progress.begin(total?.into_iter().map(|bytes| bytes as u64).sum());
    if !done.is_empty() {
        progress.resumed(done.len());
    }
    let is_left =
        |index: &usize| pair.specs[*index].role == Role::Linear && !done.contains_key(index);
    // Blocks are run again only where a site is left that reads what comes of it.
    let text = plan.sequential().filter(|_| ours.iter().any(is_left));
    let mut sequential = text.map(|text| SequentialRun::new(text, pair, plan));
    for index in ours {
        let spec = &pair.specs[index];
        let base = pair.base.tensor(&spec.name)?;
        let fine_tune = pair.fine_tune.tensor(&spec.name)?;
        let delta = if let Some(done) = done.get(&index) {
            progress.tensor(&format!("checking {}", spec.name));
            for (tensor, expected) in [(&base, done.base), (&fine_tune, done.fine_tune)] {
                let got = tensor.digest()?;
                if got != expected {
                    return Err(Error::InputChanged {
                        path: tensor.path().to_owned(),
                        tensor: spec.name.clone(),
                        work: writer.work_folder().to_owned(),
                    });
                }
            }
            let is_used = sequential.as_ref().is_some_and(|run| run.uses(spec));
            if is_used { writer.delta(index)?.map(|(_, delta)| delta) } else { None }
        } else {
            let is_linear = spec.role == Role::Linear;
            let moment = match &mut sequential {
                // What is the base's needs none.
                Some(_) if is_linear && same_bytes(&base, &fine_tune)? => None,
                Some(run) => {
                    if is_linear {
                        progress.tensor(&format!("measuring for {}", spec.name));
                    }
                    run.moment(spec)?
                }
                None => plan.moment(spec)?,
            };
            progress.tensor(&spec.name);
            let delta = put_tensor(index, spec, plan, moment.as_deref(), writer, base, fine_tune)?;
            if let Some([asked, taken]) = moment.and_then(|moment| moment.take_raised_damping()) {
                progress.warn(&format!(
                    "the second moment of what {} reads is not positive definite with a damping \
                     of {asked}: it is {taken:.1e}",
                    spec.name
                ));
            }
            delta
        };
        if let (Some(run), Some(delta)) = (&mut sequential, delta)
            && let Some(codec) = plan.codec(spec, fine_tune.shape())
            && run.uses(spec)
        {
            let of = TensorDelta::new(base, fine_tune);
            run.tell(spec, codec.prepare(delta).map_err(|e| of.explain(e))?)?;
        }
        progress.advance(fine_tune.size_bytes() as u64);
    }
    if shard.index > 1 { Ok(()) } else { put_side_files(pair, writer) }
}

/// Stores the files beside the weights.
pub(crate) fn put_side_files(pair: &Pair, writer: &mut ArtifactWriter) -> Result<()> {
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        if writer.has_file(name) {
            continue;
        }
        if let Some(bytes) = pair.fine_tune.side_file(name)? {
            let may_inherit = pair.inherits_config || name != CONFIG_FILE;
            if may_inherit && pair.base.side_file(name)?.as_ref() == Some(&bytes) {
                writer.inherit_file(name, &bytes)?;
            } else {
                writer.put_file(name, &bytes)?;
            }
        }
    }
    Ok(())
}

/// Stores a tensor and gives its delta, where it has one.
pub(crate) fn put_tensor(
    index: usize,
    spec: &TensorSpec,
    plan: &Plan,
    moment: Option<&SecondMoment>,
    writer: &mut ArtifactWriter,
    base: Tensor<'_>,
    fine_tune: Tensor<'_>,
) -> Result<Option<EncodedDelta>> {
    let origin = |base, of_fine_tune| Origin {
        index,
        name: &spec.name,
        role: spec.role,
        dtype: fine_tune.dtype(),
        shape: fine_tune.shape(),
        base,
        fine_tune: of_fine_tune,
    };
    if same_bytes(&base, &fine_tune)? {
        let digest = base.digest()?;
        writer.put(StoredTensor::unchanged(origin(digest, digest)), &[])?;
        return Ok(None);
    }
    let digests = || rayon::join(|| base.digest(), || fine_tune.digest());
    let Some(codec) = plan.codec(spec, fine_tune.shape()) else {
        let bytes = read_finite(&fine_tune, 0)?;
        let (base, of_fine_tune) = digests();
        writer.put(StoredTensor::exact(origin(base?, of_fine_tune?)), &bytes)?;
        return Ok(None);
    };
    let source = TensorDelta::new(base, fine_tune);
    let ((base_digest, digest), delta) = rayon::join(digests, || encode(codec, &source, moment));
    let delta = delta?;
    let base_bytes = base.n_weights() * fine_tune.dtype().size_bytes();
    let added_rows = read_finite(&fine_tune, base_bytes)?;
    let origin = origin(base_digest?, digest?);
    writer.put_delta(origin, codec_record(codec), &delta, &added_rows)?;
    Ok(Some(delta))
}

/// What a manifest says of a codec.
pub(crate) fn codec_record(codec: &CodecSpec) -> CodecRecord {
    CodecRecord {
        name: codec.codec().name().to_owned(),
        version: codec.codec().version(),
        options: codec.options().to_json().clone(),
    }
}

/// The bytes of a tensor from `offset`, every weight of which is finite.
fn read_finite(tensor: &Tensor<'_>, offset: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; tensor.size_bytes() - offset];
    tensor.read(offset, &mut bytes)?;
    let size = tensor.dtype().size_bytes();
    let mut wide = vec![0.0; BLOCK.min(bytes.len()) / size];
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        let wide = &mut wide[..block.len() / size];
        tensor.dtype().widen(block, wide);
        if let Some(at) = wide.iter().position(|w| !w.is_finite()) {
            let element = (offset + index * BLOCK) / size + at;
            let width = tensor.shape().last().copied().unwrap_or(1).max(1);
            return Err(Error::NotFinite {
                path: tensor.path().to_owned(),
                tensor: tensor.name().to_owned(),
                row: element / width,
                column: element % width,
                got: wide[at],
            });
        }
    }
    Ok(bytes)
}

/// Whether two tensors are the same to the byte; stops at the first difference.
pub(crate) fn same_bytes(a: &Tensor<'_>, b: &Tensor<'_>) -> Result<bool> {
    if a.dtype() != b.dtype() || a.shape() != b.shape() {
        return Ok(false);
    }
    let mut blocks = [Vec::new(), Vec::new()];
    for offset in (0..a.size_bytes()).step_by(BLOCK) {
        let len = BLOCK.min(a.size_bytes() - offset);
        for (tensor, block) in [a, b].into_iter().zip(&mut blocks) {
            block.resize(len, 0);
            tensor.read(offset, block)?;
        }
        if blocks[0] != blocks[1] {
            return Ok(false);
        }
    }
    Ok(true)
}
