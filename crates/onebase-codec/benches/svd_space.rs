//! What each step of the methods in the space of singular vectors is worth on made-up
//! deltas, whose singular values fall like a power, at one bit per weight of the codes:
//! the squared error of outputs on inputs that were not calibrated on.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::cast_possible_truncation)]
#![allow(missing_docs)]

#[path = "../tests/it/support/mod.rs"]
mod support;

use support::{Example, METHODS};

const DECAYS: [f64; 3] = [0.5, 0.8, 1.2];

fn main() {
    let examples = DECAYS.map(|decay| Example::new(512, decay, 0));
    println!("{:32} {}", "singular values i^-", DECAYS.map(|d| format!("{d:>8}")).join(" "));
    for (name, codec) in METHODS {
        let errors = examples.each_ref().map(|example| format!("{:8.4}", example.error(codec)));
        println!("{name:32} {}", errors.join(" "));
    }
}
