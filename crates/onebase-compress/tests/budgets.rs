//! Budgets are met on disk by every codec, and what is said to be the least is.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use onebase_codec::CODECS;
use onebase_compress::{Budget, Error, Pair, Plan, Silent, VectorPlan, compress};
use onebase_format::artifact::Sizes;
use support::{Folder, Memory, SAME, demo};

fn pair_of_demo() -> Pair {
    Pair::open(&demo("base"), &demo("math")).unwrap()
}

fn fitted(pair: &Pair, budget: &str, codec: &str, tables: Option<&str>) -> Result<Sizes, Error> {
    let budget: Budget = budget.parse().unwrap();
    let plan = Plan {
        linear: codec.parse().unwrap(),
        tables: tables.unwrap_or(codec).parse().unwrap(),
        vectors: VectorPlan::Exact,
    };
    let plan = budget.fit(pair, &plan, tables.is_none())?;
    let dir = tempfile::tempdir().unwrap();
    Ok(compress(pair, &plan, &dir.path().join("out"), &Silent).unwrap().1)
}

/// Bytes on disk are predicted exactly: the least size is met, and less is not, but for the
/// digits of the option in the manifest.
#[test]
fn the_least_size_is_exact() {
    let base = Memory::fixture("qwen2_tied");
    let mut tuned = base.tuned(1);
    tuned.extend_vocabulary(5);
    let folder = Folder::new(&base, &tuned);
    let pair = Pair::open(&folder.base(), &folder.fine_tune()).unwrap();
    assert!(pair.specs().iter().any(|spec| spec.name == SAME), "one tensor is the base's");
    for codec in CODECS {
        let Err(Error::OverBudget { least, .. }) = fitted(&pair, "1B", codec.name(), None) else {
            panic!("{} cannot have one byte", codec.name());
        };
        let n_bytes: u64 = least.strip_suffix('B').unwrap().parse().unwrap();
        let sizes = fitted(&pair, &least, codec.name(), None).unwrap();
        let range = n_bytes - 4..=n_bytes;
        assert!(range.contains(&sizes.total_bytes), "{}: {least}", codec.name());
        let less = fitted(&pair, &format!("{}B", n_bytes - 5), codec.name(), None);
        assert!(matches!(less, Err(Error::OverBudget { .. })), "{}", codec.name());
    }
}

#[test]
fn every_codec_stays_within_a_budget_and_uses_it() {
    let pair = pair_of_demo();
    let n_bytes = pair.fine_tune().size_bytes() as f64;
    for codec in CODECS {
        for (budget, tables) in [("2.5bpw", None), ("15%", None), ("1.2MB", Some("rtn:bits=2"))] {
            let what = format!("{} {budget}", codec.name());
            let sizes = match fitted(&pair, budget, codec.name(), tables) {
                Ok(sizes) => sizes,
                Err(Error::OverBudget { least, .. }) => {
                    // What is said to be the least can be asked for.
                    fitted(&pair, &least, codec.name(), tables).unwrap();
                    continue;
                }
                Err(error) => panic!("{what}: {error}"),
            };
            let used = match budget {
                "2.5bpw" => sizes.effective_bpw_linear() / 2.5,
                "15%" => sizes.total_bytes as f64 / (0.15 * n_bytes),
                _ => sizes.total_bytes as f64 / 1.2e6,
            };
            assert!(used <= 1.0, "{what}: {used}");
            // Ranks of matrices as small as these are coarse.
            let continuous =
                ["low-rank", "dqrelo", "dqrelo-plus", "magnitude"].contains(&codec.name());
            assert!(!continuous || used > 0.85, "{what}: {used}");
        }
    }
}

#[test]
fn budgets_are_read_as_people_write_them() {
    for (text, expected) in [
        ("2.1bpw", Budget::BitsPerWeight(2.1)),
        ("10%", Budget::Share(0.1)),
        ("200MB", Budget::Bytes(200_000_000)),
        ("1.5GiB", Budget::Bytes(1_610_612_736)),
        ("12kB", Budget::Bytes(12_000)),
        ("7 KiB", Budget::Bytes(7168)),
        ("99B", Budget::Bytes(99)),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
    }
    for bad in ["", "2.1", "bpw", "-1bpw", "0%", "nan%", "infMB", "1 TBB", "1e999B", "200 M"] {
        let error = bad.parse::<Budget>().unwrap_err();
        assert!(error.contains("2.1bpw, 10% or 200MB"), "{bad}");
    }
}
