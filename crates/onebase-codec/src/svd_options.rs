//! The options of codecs that decompose.

use crate::numerics::SvdMethod;
use crate::{Kind, OptionSpec, Options};

/// How the decomposition is computed.
pub(crate) const SVD: OptionSpec = OptionSpec {
    name: "svd",
    doc: "how the decomposition is computed",
    kind: Kind::Choice(&["randomized", "full"]),
};

/// [`SVD`] for a codec that was there before a choice was: the full one is the
/// default, so that what older manifests leave out means what it did.
pub(crate) const FULL_SVD: OptionSpec =
    OptionSpec { kind: Kind::Choice(&["full", "randomized"]), ..SVD };

/// Where a randomized one begins.
pub(crate) const SEED: OptionSpec = OptionSpec {
    name: "seed",
    doc: "of the randomized decomposition",
    kind: Kind::Int { min: 0, max: 65535, multiple_of: 1, default: 0 },
};

/// What [`SVD`] or [`FULL_SVD`] and [`SEED`] say.
pub(crate) fn svd_method(options: &Options) -> SvdMethod {
    match options.choice(SVD.name) {
        "full" => SvdMethod::Full,
        _ => SvdMethod::Randomized { seed: options.int(SEED.name) as u64 },
    }
}
