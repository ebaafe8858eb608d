//! The fine-tune as a code on the limit line would leave it.
//!
//! A code that reaches the limit leaves of each direction of variance λ above the
//! water level θ the output of the Gaussian test channel (T. Cover and J. Thomas,
//! "Elements of Information Theory", 2nd ed., section 10.3): `(1 − θ/λ)` of the
//! delta and independent noise, which together differ from the delta by θ; and
//! nothing of the other directions. Drawing that noise gives weights whose error
//! is the line's, and a model that answers with them says how much skill such a code
//! would keep. No code is known that does it; the bits are the line's.
//!
//! Where a delta has less energy along a direction than the variance that the line
//! reckons with, noise makes up for it, also where nothing is left of the delta: the
//! simulated code knows no more than the line does. Where it has more and nothing is
//! left, the error is a little above the line's, which shows at very few bits.

use std::path::Path;

use onebase_codec::numerics::{
    Eigen, gram_of_shorter_side, product, product_transposed, symmetric_eigen,
};
use onebase_codec::{DeltaSource, read_wide};
use onebase_compress::{Pair, TensorDelta};
use onebase_format::artifact::Role;
use onebase_format::{CONFIG_FILE, SIDE_FILES, StagedFolder, Tensor, TensorEntry, TensorWriter};
use onebase_model::TensorSpec;
use onebase_tensor::{DType, stream};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::limit::Spectrum;
use crate::{Result, Watcher};

/// Weights worked on at a time.
const BLOCK_WEIGHTS: usize = 1 << 20;

/// Bits that the code would need.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IdealBits {
    /// For the linear sites.
    pub(crate) linear: f64,
    /// For every tensor: embeddings and head at the same water level, norms, biases and
    /// routers as they are.
    pub(crate) total: f64,
}

/// Writes a checkpoint in f32 of what is left at a water level into `folder`, which
/// must not exist. The noise is drawn from the streams of `seed`, the tensors'
/// names and the rows.
pub(crate) fn write_checkpoint(
    pair: &Pair,
    level: f64,
    seed: u64,
    folder: &Path,
    watcher: &dyn Watcher,
) -> Result<IdealBits> {
    let staged = StagedFolder::create(folder)?;
    let entry = |spec: &TensorSpec| TensorEntry {
        name: spec.name.clone(),
        dtype: DType::F32,
        shape: spec.shape.clone(),
    };
    let entries: Vec<TensorEntry> = pair.specs().iter().map(entry).collect();
    let mut writer = TensorWriter::create(&staged.path("model.safetensors"), &entries)?;
    watcher.begin("a code on the limit line", entries.len() as u64);
    let mut bits = IdealBits::default();
    for spec in pair.specs() {
        let finetune = pair.fine_tune().tensor(&spec.name)?;
        if spec.role == Role::Vector {
            writer.write(&widened(&finetune, 0)?)?;
            #[allow(clippy::cast_precision_loss)]
            let exact = 8.0 * finetune.size_bytes() as f64;
            bits.total += exact;
        } else {
            let channel = Channel::new(pair, spec, level, seed)?;
            channel.write(&mut writer)?;
            // Rows past the base's are exact.
            let covered = channel.delta.shape();
            let base_bytes = covered[0] * covered[1] * finetune.dtype().size_bytes();
            writer.write(&widened(&finetune, base_bytes)?)?;
            #[allow(clippy::cast_precision_loss)]
            let added = 8.0 * (finetune.size_bytes() - base_bytes) as f64;
            bits.total += channel.bits + added;
            if spec.role == Role::Linear {
                bits.linear += channel.bits;
            }
        }
        watcher.advance(1);
    }
    writer.finish()?;
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        if let Some(bytes) = pair.fine_tune().side_file(name)? {
            staged.write(name, &bytes)?;
        }
    }
    staged.commit()?;
    Ok(bits)
}

/// The elements of a tensor from a byte offset, as f32 in little-endian bytes.
fn widened(tensor: &Tensor<'_>, offset: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; tensor.size_bytes() - offset];
    tensor.read(offset, &mut bytes)?;
    let mut wide = vec![0.0; bytes.len() / tensor.dtype().size_bytes()];
    tensor.dtype().widen(&bytes, &mut wide);
    Ok(wide.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// The Gaussian test channel of one delta.
struct Channel<'a> {
    delta: TensorDelta<'a>,
    base: Tensor<'a>,
    name: String,
    seed: u64,
    bits: f64,
    /// Directions of the shorter side, one a row, `[n, n]`.
    directions: Vec<f64>,
    /// Of each direction: the share of the delta that is left, and the standard
    /// deviation of the noise.
    gains: Vec<[f64; 2]>,
}

impl<'a> Channel<'a> {
    fn new(pair: &'a Pair, spec: &TensorSpec, level: f64, seed: u64) -> Result<Self> {
        let delta = pair.delta(&spec.name)?;
        let shape = delta.shape();
        let n = shape[0].min(shape[1]);
        let (gram, _) = gram_of_shorter_side(&delta).map_err(|e| delta.explain(e))?;
        let Eigen { values, vectors } = symmetric_eigen(&gram, n)?;
        let spectrum = Spectrum::new(&values, shape);
        #[allow(clippy::cast_precision_loss)]
        let n_rows = shape[0].max(shape[1]) as f64;
        let mut gains: Vec<[f64; 2]> = spectrum
            .variances()
            .iter()
            .zip(&values)
            .map(|(variance, square)| {
                let left = (1.0 - level / variance).max(0.0);
                // What the gain alone loses of the energy that is there.
                let lost = (1.0 - left).powi(2) * square / n_rows;
                [left, (variance.min(level) - lost).max(0.0).sqrt()]
            })
            .collect();
        gains.resize(n, [0.0; 2]);
        let (bits, name) = (spectrum.bits(level), spec.name.clone());
        let base = pair.base().tensor(&spec.name)?;
        Ok(Self { delta, base, name, seed, bits, directions: vectors, gains })
    }

    /// Writes base plus what is left of the delta.
    fn write(&self, writer: &mut TensorWriter) -> Result<()> {
        let shape @ [n_rows, n_cols] = self.delta.shape();
        if n_rows < n_cols {
            let wide = read(&self.delta, 0..n_rows)?;
            let tall = transposed(&wide, shape);
            let left = transposed(&self.pass(&tall, 0), [n_cols, n_rows]);
            return self.add_and_write(0..n_rows, &left, writer);
        }
        for rows in blocks(shape) {
            let left = self.pass(&read(&self.delta, rows.clone())?, rows.start);
            self.add_and_write(rows, &left, writer)?;
        }
        Ok(())
    }

    /// What is left of rows along the longer side, the first of which is number
    /// `first`.
    fn pass(&self, rows: &[f64], first: usize) -> Vec<f64> {
        let n = self.gains.len();
        let n_rows = rows.len() / n.max(1);
        let mut coefficients = product_transposed(rows, &self.directions, [n_rows, n, n]);
        coefficients.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, values)| {
            let mut rng = stream(self.seed, &self.name, (first + row) as u64);
            for (value, [left, noise]) in values.iter_mut().zip(&self.gains) {
                let drawn: f64 = StandardNormal.sample(&mut rng);
                *value = left * *value + noise * drawn;
            }
        });
        product(&coefficients, &self.directions, [n_rows, n, n])
    }

    fn add_and_write(
        &self,
        rows: std::ops::Range<usize>,
        left: &[f64],
        writer: &mut TensorWriter,
    ) -> Result<()> {
        let n_cols = self.delta.shape()[1];
        let size = self.base.dtype().size_bytes();
        let mut bytes = vec![0; rows.len() * n_cols * size];
        self.base.read(rows.start * n_cols * size, &mut bytes)?;
        let mut weights = vec![0.0; left.len()];
        self.base.dtype().widen(&bytes, &mut weights);
        let mut sum = Vec::with_capacity(4 * left.len());
        for (weight, left) in weights.into_iter().zip(left) {
            #[allow(clippy::cast_possible_truncation)]
            let weight = (f64::from(weight) + left) as f32;
            sum.extend_from_slice(&weight.to_le_bytes());
        }
        Ok(writer.write(&sum)?)
    }
}

fn read(delta: &TensorDelta<'_>, rows: std::ops::Range<usize>) -> Result<Vec<f64>> {
    Ok(read_wide(delta, rows).map_err(|e| delta.explain(e))?)
}

/// Runs of rows that are worked on together.
fn blocks([n_rows, n_cols]: [usize; 2]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    (0..n_rows).step_by(block_rows).map(move |first| first..n_rows.min(first + block_rows))
}

fn transposed(a: &[f64], [n_rows, n_cols]: [usize; 2]) -> Vec<f64> {
    let element = |i: usize| a[i % n_rows * n_cols + i / n_rows];
    (0..n_rows * n_cols).map(element).collect()
}

#[cfg(test)]
mod tests {
    use onebase_codec::numerics::{gram, symmetric_eigenvalues};

    use super::*;

    fn pair() -> Pair {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
        Pair::open(&demo.join("base"), &demo.join("math")).unwrap()
    }

    /// Of tall, square and wide deltas: what is lost is what the line says, to what
    /// the shrinkage of variances and the draw leave open.
    #[test]
    fn what_is_lost_is_the_error_of_the_line() {
        let pair = pair();
        for site in ["mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"] {
            let name = format!("model.layers.2.{site}.weight");
            let spec = pair.specs().iter().find(|spec| spec.name == name).unwrap();
            let largest = Channel::new(&pair, spec, f64::MAX, 0).unwrap();
            assert_eq!(largest.bits, 0.0);
            assert!(largest.gains.iter().all(|gain| gain[0] == 0.0));

            let shape @ [n_rows, n_cols] = largest.delta.shape();
            let delta = read(&largest.delta, 0..n_rows).unwrap();
            let wide = n_rows < n_cols;
            let tall = if wide { transposed(&delta, shape) } else { delta };
            let (gram, n) = gram(&tall, [n_rows.max(n_cols), n_rows.min(n_cols)]);
            let spectrum = Spectrum::new(&symmetric_eigenvalues(&gram, n).unwrap(), shape);
            let squared = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
            for share in [0.02, 0.2] {
                // A level that leaves some directions out and some in.
                #[allow(clippy::cast_precision_loss)]
                let level = share * squared(&tall) / tall.len() as f64;
                let channel = Channel::new(&pair, spec, level, 0).unwrap();
                assert!(channel.bits > 0.0);
                let left = channel.pass(&tall, 0);
                let lost: Vec<f64> = tall.iter().zip(&left).map(|(a, b)| a - b).collect();
                let n_kept = channel.gains.iter().filter(|gain| gain[0] > 0.0).count();
                assert!(n_kept > 0, "{site}, {share}: {n_kept}");
                let ratio = squared(&lost) / spectrum.error(level);
                assert!((ratio - 1.0).abs() < 0.1, "{site}, {share}: {ratio}");
                assert_eq!(channel.pass(&tall, 0), left, "the same seed draws the same");
                let other = Channel { seed: 1, ..channel };
                assert_ne!(other.pass(&tall, 0), left);
            }
        }
    }

    #[test]
    fn the_checkpoint_does_not_depend_on_threads() {
        let pair = pair();
        let place = tempfile::tempdir().unwrap();
        let write = |threads: usize| {
            let folder = place.path().join(threads.to_string());
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let bits = pool
                .install(|| write_checkpoint(&pair, 1e-5, 3, &folder, &crate::Unwatched))
                .unwrap();
            assert!(bits.linear > 0.0 && bits.total > bits.linear);
            std::fs::read(folder.join("model.safetensors")).unwrap()
        };
        assert!(write(1) == write(3));
    }
}
