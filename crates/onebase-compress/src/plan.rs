use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use onebase_codec::{CodecSpec, SecondMoment};
use onebase_format::artifact::Role;
use onebase_format::statistics::StatisticsRecord;
use onebase_model::TensorSpec;
use onebase_tensor::EncodedDelta;

use crate::calibration::check_calibrated;
use crate::pair::TensorDelta;
use crate::{Calibration, Error, Result, Sequential};

/// How exact storage is written.
const EXACT: &str = "exact";

/// How the tensors of a fine-tune are stored. Routers are always exact.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The codec of the linear sites.
    pub linear: CodecSpec,
    /// What is done with embeddings and head.
    pub tables: TablePlan,
    /// What is done with norms and biases.
    pub vectors: VectorPlan,
    /// Linear sites that have a codec of their own, by the tensor's name.
    pub sites: BTreeMap<String, CodecSpec>,
    /// The inputs by which the errors of linear sites are weighed.
    pub calibration: Option<Inputs>,
}

/// What is known of the inputs of linear sites.
#[derive(Clone, Debug)]
pub enum Inputs {
    /// They were measured before.
    Statistics(Arc<Calibration>),
    /// They are measured on this text while compressing.
    Sequential(Arc<Sequential>),
}

impl Inputs {
    /// What a manifest says of them.
    pub fn record(&self) -> StatisticsRecord {
        match self {
            Inputs::Statistics(calibration) => calibration.record(),
            Inputs::Sequential(text) => text.record(),
        }
    }
}

impl Plan {
    /// A plan with one codec for all linear sites, and no statistics.
    pub fn new(linear: CodecSpec, tables: TablePlan, vectors: VectorPlan) -> Self {
        Self { linear, tables, vectors, sites: BTreeMap::new(), calibration: None }
    }

    /// Checks that each linear site has a codec that can be calibrated, if inputs are known
    /// or measured.
    ///
    /// # Errors
    /// When one has not.
    pub fn check_calibration(&self) -> Result<()> {
        if self.calibration.is_none() {
            return Ok(());
        }
        self.sites.values().chain([&self.linear]).try_for_each(check_calibrated)
    }

    /// The text on which inputs are measured while compressing, if they are.
    pub(crate) fn sequential(&self) -> Option<&Sequential> {
        match &self.calibration {
            Some(Inputs::Sequential(text)) => Some(text),
            Some(Inputs::Statistics(_)) | None => None,
        }
    }

    /// Checks that no inputs are to be measured while compressing, where `what` is done that
    /// takes sites out of their order.
    ///
    /// # Errors
    /// When some are.
    pub(crate) fn check_any_order(&self, what: &'static str) -> Result<()> {
        match self.sequential() {
            Some(_) => Err(Error::OutOfOrder { what }),
            None => Ok(()),
        }
    }

    /// The moment of the inputs of a linear site, where it was measured before.
    pub(crate) fn moment(&self, tensor: &TensorSpec) -> Result<Option<Arc<SecondMoment>>> {
        let Some(Inputs::Statistics(calibration)) = &self.calibration else { return Ok(None) };
        match tensor.role {
            Role::Linear => calibration.moment(tensor),
            Role::Embedding | Role::Head => {
                // Tables are the largest tensors: a moment beside them helps nobody.
                calibration.forget();
                Ok(None)
            }
            Role::Vector => Ok(None),
        }
    }

    /// The codec of a tensor of this shape; `None` where it is stored as it is.
    pub fn codec(&self, tensor: &TensorSpec, shape: &[usize]) -> Option<&CodecSpec> {
        match (tensor.role, &self.tables, &self.vectors) {
            // A router, see the artifact format.
            (Role::Vector, ..) if shape.len() > 1 => None,
            (Role::Linear, _, _) => Some(self.sites.get(&tensor.name).unwrap_or(&self.linear)),
            (Role::Embedding | Role::Head, TablePlan::Codec(codec), _)
            | (Role::Vector, _, VectorPlan::Codec(codec)) => Some(codec),
            (Role::Embedding | Role::Head, TablePlan::Exact, _)
            | (Role::Vector, _, VectorPlan::Exact) => None,
        }
    }
}

/// Encodes a delta, weighing its errors by the moment of the site's inputs where that is
/// known.
pub(crate) fn encode(
    codec: &CodecSpec,
    delta: &TensorDelta<'_>,
    moment: Option<&SecondMoment>,
) -> Result<EncodedDelta> {
    let encoded = match (moment, codec.calibrated()) {
        (Some(moment), Some(calibrated)) => {
            calibrated.encode_calibrated(codec.options(), delta, moment)
        }
        _ => codec.encode(delta),
    };
    encoded.map_err(|e| delta.explain(e))
}

/// How token tables, the embeddings and the head, are stored.
#[derive(Clone, Debug)]
pub enum TablePlan {
    /// As they are in the fine-tune.
    Exact,
    /// As a delta.
    Codec(CodecSpec),
}

/// How vectors, the norms and biases, are stored.
#[derive(Clone, Debug, Default)]
pub enum VectorPlan {
    /// As they are in the fine-tune.
    #[default]
    Exact,
    /// As a delta, a vector `[n]` being a matrix `[1, n]`.
    Codec(CodecSpec),
}

/// Both are written as `exact` or as a codec.
macro_rules! written {
    ($($plan:ident)*) => {$(
        impl fmt::Display for $plan {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $plan::Exact => f.write_str(EXACT),
                    $plan::Codec(codec) => codec.fmt(f),
                }
            }
        }

        impl FromStr for $plan {
            type Err = onebase_codec::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if text == EXACT { Ok($plan::Exact) } else { text.parse().map($plan::Codec) }
            }
        }
    )*};
}

written!(TablePlan VectorPlan);
