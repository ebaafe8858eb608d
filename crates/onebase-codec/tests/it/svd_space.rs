//! Each step of the methods in the space of singular vectors lowers the error of outputs on
//! inputs that were not calibrated on, and those of the published methods are in the order
//! and about in the proportions that are known of them. `cargo bench --bench svd_space`
//! prints the table of larger matrices.

use std::collections::BTreeMap;

use crate::support::{Example, METHODS};

#[test]
fn steps_gain_what_they_are_known_to() {
    // How much of the error of fixed widths optimal ones leave, by the fall of the
    // singular values.
    for (decay, left) in [(0.5, 0.8..1.1), (0.8, 0.5..0.95), (1.2, 0.05..0.4)] {
        let example = Example::new(256, decay, 0);
        let errors: BTreeMap<&str, f64> =
            METHODS.iter().map(|(name, codec)| (*name, example.error(codec))).collect();
        let less = |better: &str, worse: &str, slack: f64| {
            let (a, b) = (errors[better], errors[worse]);
            assert!(a < slack * b, "{decay}: {better} {a}, {worse} {b}");
        };
        for widths in ["8/3/2", "optimal"] {
            let step = |u: &str| format!("{widths}, u {u}");
            less(&step("for the pairs kept"), &step("as it is"), 0.98);
            less(&step("for the delta"), &step("for the pairs kept"), 1.0);
        }
        for u in ["as it is", "for the pairs kept", "for the delta"] {
            let ratio = errors[&*format!("optimal, u {u}")] / errors[&*format!("8/3/2, u {u}")];
            assert!(left.contains(&ratio), "{decay}: {u} {ratio}");
        }
        // The cap of three is nearly free, that of one is not.
        less("optimal, u for the delta", "three widths", 1.02);
        less("three widths", "optimal, u for the delta", 1.25);
        less("three widths", "one width", 1.0);
        less("a sweep more", "optimal, u for the delta", 0.98);
        less("both", "a scale for each pair", 0.99);
        less("8/3/2, u as it is", "rank 16 in bf16 for 512 x 512", 1.3);
        less("8/3/2, u as it is", "signs, one scale", 1.0);
    }
}
