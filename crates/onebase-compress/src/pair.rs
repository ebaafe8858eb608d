use std::cell::RefCell;
use std::cmp::Reverse;
use std::ops::Range;
use std::path::Path;

use onebase_codec::DeltaSource;
use onebase_format::artifact::{Origin, Shard, digest_of_tensors};
use onebase_format::{CONFIG_FILE, Checkpoint, Digest, SIDE_FILES, Tensor};
use onebase_model::{ModelConfig, TensorSpec, check_tensors, tensor_specs};

use crate::compress::same_bytes;
use crate::{Error, Result};

/// A base and a fine-tune that belong together.
#[derive(Debug)]
pub struct Pair {
    pub(crate) base: Checkpoint,
    pub(crate) fine_tune: Checkpoint,
    /// The fine-tune's tensors.
    pub(crate) specs: Vec<TensorSpec>,
    /// Whether the fine-tune's configuration may be taken from the base that an artifact is
    /// loaded against, where it is the same.
    pub(crate) inherits_config: bool,
    /// Bytes of the fine-tune's tensors as the user has them.
    pub(crate) fine_tune_bytes: u64,
}

impl Pair {
    /// Opens two checkpoints and checks that they are the same kind of model.
    ///
    /// # Errors
    /// When one cannot be read, is not supported, or they differ in more than
    /// their weights and added vocabulary rows.
    pub fn open(base: &Path, fine_tune: &Path) -> Result<Self> {
        let open = |dir| -> Result<(Checkpoint, ModelConfig)> {
            let checkpoint = Checkpoint::open(dir)?;
            let config = ModelConfig::from_json(checkpoint.config(), checkpoint.dir())?;
            Ok((checkpoint, config))
        };
        let (base, base_config) = open(base)?;
        let (fine_tune, config) = open(fine_tune)?;
        // What differs between the models is said before what is wrong in one.
        base_config.check_fine_tune(&config, fine_tune.dir())?;
        check_tensors(&base, &base_config)?;
        check_tensors(&fine_tune, &config)?;
        let (specs, fine_tune_bytes) = (tensor_specs(&config), fine_tune.size_bytes());
        Ok(Self { base, fine_tune, specs, inherits_config: true, fine_tune_bytes })
    }

    /// The same pair, its checkpoints standing for others: the base for one with another
    /// configuration, the fine-tune for one of this many bytes.
    pub(crate) fn standing_for(self, fine_tune_bytes: u64) -> Self {
        Self { inherits_config: false, fine_tune_bytes, ..self }
    }

    /// Bytes of the fine-tune's tensors as the user has them.
    pub fn fine_tune_bytes(&self) -> u64 {
        self.fine_tune_bytes
    }

    /// The base.
    pub fn base(&self) -> &Checkpoint {
        &self.base
    }

    /// The fine-tune.
    pub fn fine_tune(&self) -> &Checkpoint {
        &self.fine_tune
    }

    /// The fine-tune's tensors, in the order of the forward pass.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// An error of a family's tree as one that names the base.
    pub(crate) fn explain_family(&self, source: onebase_codec::Error) -> Error {
        Error::Codec { path: self.base.dir().to_owned(), tensor: "all".to_owned(), source }
    }

    /// Whether any tensor differs from the base's.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn is_changed(&self) -> Result<bool> {
        for index in 0..self.specs.len() {
            if !self.is_unchanged(index)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the tensor at a position is the base's to the byte.
    pub(crate) fn is_unchanged(&self, index: usize) -> Result<bool> {
        let name = &self.specs[index].name;
        same_bytes(&self.base.tensor(name)?, &self.fine_tune.tensor(name)?)
    }

    /// Positions of the tensors of a shard, ascending: shards are about as large as
    /// each other, the largest tensors handed out first.
    pub(crate) fn shard(&self, shard: Shard) -> Result<Vec<usize>> {
        if shard.count > self.specs.len() {
            let (count, n_tensors) = (shard.count, self.specs.len());
            return Err(Error::TooManyShards { count, n_tensors });
        }
        let mut sizes = Vec::new();
        for (index, spec) in self.specs.iter().enumerate() {
            sizes.push((self.fine_tune.tensor(&spec.name)?.size_bytes(), index));
        }
        sizes.sort_by_key(|(size, index)| (Reverse(*size), *index));
        let mut loads = vec![0usize; shard.count];
        let mut ours = Vec::new();
        for (size, index) in sizes {
            let Some(least) = (0..shard.count).min_by_key(|i| loads[*i]) else {
                unreachable!("there is a shard")
            };
            loads[least] += size;
            if least + 1 == shard.index {
                ours.push(index);
            }
        }
        ours.sort_unstable();
        Ok(ours)
    }

    /// A digest of the files beside the weights and of samples of every tensor, which tells
    /// these checkpoints from others without reading them; or, `whole`, of every tensor:
    /// shards are compared by nothing else.
    pub(crate) fn fingerprint(&self, whole: bool) -> Result<Digest> {
        const SAMPLES: usize = 8;
        const SAMPLE_BYTES: usize = 64;
        let mut seen = Vec::new();
        for checkpoint in [&self.base, &self.fine_tune] {
            for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
                let file = checkpoint.side_file(name)?.map(|bytes| Digest::of(&bytes));
                seen.extend_from_slice(format!("{name} {file:?}\n").as_bytes());
            }
            if whole {
                let names: Vec<&str> = self.specs.iter().map(|spec| spec.name.as_str()).collect();
                let digests = checkpoint.digests(&names)?;
                let digest = digest_of_tensors(names.into_iter().zip(digests));
                seen.extend_from_slice(digest.to_string().as_bytes());
                continue;
            }
            for spec in &self.specs {
                let tensor = checkpoint.tensor(&spec.name)?;
                let head = format!("{} {} {:?}\n", spec.name, tensor.dtype(), tensor.shape());
                seen.extend_from_slice(head.as_bytes());
                let len = SAMPLE_BYTES.min(tensor.size_bytes());
                for sample in 0..SAMPLES {
                    let at = (tensor.size_bytes() - len) / (SAMPLES - 1) * sample;
                    let begin = seen.len();
                    seen.resize(begin + len, 0);
                    tensor.read(at, &mut seen[begin..])?;
                }
            }
        }
        Ok(Digest::of(&seen))
    }

    /// What is known of the tensor at a position, whatever way it is stored.
    pub(crate) fn origin(
        &self,
        index: usize,
        base: Digest,
        fine_tune: Digest,
    ) -> Result<Origin<'_>> {
        let TensorSpec { name, role, shape } = &self.specs[index];
        let dtype = self.fine_tune.tensor(name)?.dtype();
        Ok(Origin { index, name, role: *role, dtype, shape, base, fine_tune })
    }

    /// The delta of a matrix or a vector, to be read by rows.
    ///
    /// # Errors
    /// When one of the two has no such tensor.
    pub fn delta(&self, tensor: &str) -> Result<TensorDelta<'_>> {
        Ok(TensorDelta::new(self.base.tensor(tensor)?, self.fine_tune.tensor(tensor)?))
    }
}

/// The delta of one matrix over the rows that the base has; that of a vector `[n]` is
/// the matrix `[1, n]`.
#[derive(Debug)]
pub struct TensorDelta<'a> {
    pub(crate) base: Tensor<'a>,
    pub(crate) fine_tune: Tensor<'a>,
    shape: [usize; 2],
}

impl<'a> TensorDelta<'a> {
    /// Both tensors are vectors of one length, or matrices of one width, the fine-tune's
    /// at least as high.
    pub(crate) fn new(base: Tensor<'a>, fine_tune: Tensor<'a>) -> Self {
        let shape = match *base.shape() {
            [n] => [1, n],
            ref shape => [shape[0], shape[1]],
        };
        Self { base, fine_tune, shape }
    }

    /// Turns a codec's complaint about a weight into one that names its file.
    pub fn explain(&self, error: onebase_codec::Error) -> Error {
        let tensor = self.fine_tune.name().to_owned();
        if let onebase_codec::Error::NotFinite { row, column, .. } = error {
            for side in [&self.base, &self.fine_tune] {
                let mut weight = [0.0];
                let size = side.dtype().size_bytes();
                let offset = (row * self.shape[1] + column) * size;
                if read_widened(side, offset, &mut weight).is_ok() && !weight[0].is_finite() {
                    let path = side.path().to_owned();
                    return Error::NotFinite { path, tensor, row, column, got: weight[0] };
                }
            }
        }
        Error::Codec { path: self.fine_tune.path().to_owned(), tensor, source: error }
    }
}

/// Reads elements from byte `offset` as f32.
pub(crate) fn read_widened(
    tensor: &Tensor<'_>,
    offset: usize,
    out: &mut [f32],
) -> onebase_format::Result<()> {
    let mut bytes = vec![0; out.len() * tensor.dtype().size_bytes()];
    tensor.read(offset, &mut bytes)?;
    tensor.dtype().widen(&bytes, out);
    Ok(())
}

impl DeltaSource for TensorDelta<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> onebase_codec::Result<()> {
        let first = rows.start * self.shape[1];
        let n = out.len();
        let read = |tensor: &Tensor<'_>, bytes: &mut Vec<u8>| {
            let size = tensor.dtype().size_bytes();
            bytes.resize(n * size, 0);
            tensor.read(first * size, bytes).map_err(|e| onebase_codec::Error::Source(Box::new(e)))
        };
        BYTES.with_borrow_mut(|bytes| {
            read(&self.fine_tune, bytes)?;
            self.fine_tune.dtype().widen(bytes, out);
            read(&self.base, bytes)?;
            self.base.dtype().subtract(bytes, out);
            Ok(())
        })
    }
}

thread_local! {
    /// A block's bytes: reading is most of the work, clearing a new buffer for
    /// each block would add to it.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}
