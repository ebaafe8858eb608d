//! What a tree of shared codes is worth on made-up families: the mean relative squared error
//! of codes of each model's own, as planned, after one pass from the top down and after
//! fitting nodes to each other, at equal bits of codes.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::cast_possible_truncation)]
#![allow(missing_docs)]

#[path = "../tests/it/families/mod.rs"]
mod families;

use families::{CASES, Measured, decibels, written};

const SHAPE: [usize; 2] = [128, 1024];

fn main() {
    let [n_rows, n_cols] = SHAPE;
    let header = ["bits", "alone", "expected", "one pass", "fitted", "dB", "known"];
    println!("{:34}{}", "models and energy in common", header.map(|h| format!("{h:>9}")).join(""));
    for case in CASES {
        let deltas = case.deltas(n_rows, n_cols);
        let family = Measured::new(&deltas, n_rows, n_cols);
        let mut flat = vec![0u8; family.tree.nodes().len()];
        family.tree.leaves().for_each(|leaf| flat[leaf] = case.bits as u8);
        let alone = family.error(&flat, 0);
        let (bits, expected) = family.plan(case.bits);
        let (once, fitted) = (family.error(&bits, 0), family.error(&bits, 3));
        println!(
            "{:34}{:9}{alone:9.4}{expected:9.4}{once:9.4}{fitted:9.4}{:9.2}{:9.1}  {}",
            case.name,
            case.bits,
            decibels(alone, fitted),
            case.known_gain,
            written(&family.tree, &bits),
        );
    }
}
