//! Second moments of what linear sites read: measured on tokens, kept as statistics, and
//! used to weigh the errors of codecs that can.

mod measure;
mod moments;
mod sequential;
mod tokens;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use onebase_codec::{CALIBRATED, CodecSpec, SecondMoment};
use onebase_format::artifact::{BaseRecord, Role};
use onebase_format::statistics::{Statistics, StatisticsRecord};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{SiteInput, TensorSpec};

use crate::{Error, Pair, Result};

pub use measure::calibrate;
pub use moments::{InputMoment, LayerMoments, MomentRun, WINDOW_TOKENS, quadratic_form};
pub(crate) use moments::{add_moment, held_window};
pub use sequential::Sequential;
pub(crate) use sequential::SequentialRun;
pub use tokens::{generated_tokens, random_tokens};

/// Statistics of a pair's base or fine-tune, opened to encode with.
#[derive(Debug)]
pub struct Calibration {
    statistics: Statistics,
    last: Mutex<Option<Kept>>,
}

/// The moment that was asked for last: sites that read the same input follow each other,
/// and so read it, and what codecs derive from it, once.
#[derive(Clone, Debug)]
struct Kept {
    input: (usize, SiteInput),
    moment: Option<Arc<SecondMoment>>,
}

impl Calibration {
    /// Opens statistics and checks that they are of the pair's base or fine-tune, by the
    /// digests of all tensors, and have every linear site's input.
    ///
    /// # Errors
    /// When they cannot be read, are damaged, or are of another model.
    pub fn open(dir: &Path, pair: &Pair) -> Result<Self> {
        let statistics = Statistics::open(dir)?;
        let model = &statistics.manifest().model;
        let mut others = Vec::new();
        for checkpoint in [&pair.base, &pair.fine_tune] {
            let own = record_of(checkpoint, &pair.specs)?;
            if own.blake3 == model.blake3 {
                others.clear();
                break;
            }
            others.push(own);
        }
        if !others.is_empty() {
            let (path, got) = (dir.to_owned(), model.clone());
            return Err(Error::OtherStatistics { path, got, expected: others });
        }
        for spec in pair.specs.iter().filter(|spec| spec.role == Role::Linear) {
            if let Some((layer, input)) = SiteInput::of_weight(&spec.name) {
                statistics.check(layer, &input.to_string(), spec.shape[1])?;
            }
        }
        Ok(Self { statistics, last: Mutex::new(None) })
    }

    /// What a manifest says of the statistics.
    pub fn record(&self) -> StatisticsRecord {
        self.statistics.record()
    }

    /// The second moment of the inputs of a linear site, `Σ x xᵀ` over the number of all
    /// tokens; `None` of an expert that no token was sent to, of whose inputs nothing is
    /// known, and of what is no linear site.
    ///
    /// # Errors
    /// When it cannot be read or was altered.
    pub fn moment(&self, spec: &TensorSpec) -> Result<Option<Arc<SecondMoment>>> {
        let Some(input) = SiteInput::of_weight(&spec.name) else { return Ok(None) };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = last.as_ref().filter(|kept| kept.input == input) {
            return Ok(kept.moment.clone());
        }
        // Gone before the next one is read: one at a time is in memory.
        *last = None;
        let n = spec.shape[1];
        let values = self.statistics.moment(input.0, &input.1.to_string(), n)?;
        let is_seen = values.iter().any(|v| *v != 0.0);
        let moment = is_seen.then(|| SecondMoment::new(values, n)).flatten().map(Arc::new);
        *last = Some(Kept { input, moment: moment.clone() });
        Ok(moment)
    }

    /// Lets go of the moment that is kept for the next site.
    pub(crate) fn forget(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What statistics and artifacts say of a model with these tensors.
fn record_of(checkpoint: &Checkpoint, specs: &[TensorSpec]) -> Result<BaseRecord> {
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let digests: Vec<Digest> = checkpoint.digests(&names)?;
    Ok(BaseRecord::new(&checkpoint.name(), names.into_iter().zip(digests)))
}

/// Checks that a codec can use statistics.
///
/// # Errors
/// When it cannot; the hint names those that can.
pub fn check_calibrated(codec: &CodecSpec) -> Result<()> {
    if codec.calibrated().is_some() {
        return Ok(());
    }
    Err(Error::NotCalibrated {
        codec: codec.codec().name(),
        known: CALIBRATED.iter().map(|codec| codec.name()).collect(),
    })
}
