//! Laws of a family's tree.

use crate::families::{
    CASES, GROUP, Measured, decibels, free, gaussian, site_nodes, sources, written,
};
use onebase_codec::rqt::{
    Costs, Fit, Gram, Residual, Rqt, SiteNode, SitePath, Topology, Tree, encode_tree,
    expected_error, fitted_gains, groups, ladder, path_energy, predict, share_out,
};
use onebase_codec::{CodecSpec, DeltaLinear, Error};
use onebase_tensor::{EncodedDelta, MatrixRef, PartData};

fn part<'a>(delta: &'a EncodedDelta, name: &str) -> &'a PartData {
    delta.parts[name].data()
}

fn prepared(delta: &EncodedDelta, bits: usize) -> Box<dyn DeltaLinear> {
    let codec: CodecSpec = format!("rtn:bits={bits},group_size={GROUP}").parse().unwrap();
    codec.prepare(delta.clone()).unwrap()
}

fn decoded(delta: &EncodedDelta, bits: usize) -> Vec<f32> {
    let node = prepared(delta, bits);
    let mut out = vec![0.0; delta.shape.iter().product()];
    node.write_rows(0..delta.shape[0], &mut out);
    out
}

#[test]
fn gains_are_those_that_are_known_and_errors_those_that_are_expected() {
    let (n_rows, n_cols) = (64, 1024);
    for case in CASES {
        let deltas = case.deltas(n_rows, n_cols);
        let family = Measured::new(&deltas, n_rows, n_cols);
        let mut flat = vec![0u8; family.tree.nodes().len()];
        family.tree.leaves().for_each(|leaf| flat[leaf] = case.bits as u8);
        let alone = family.error(&flat, 0);
        let (bits, expected) = family.plan(case.bits);
        let fitted = family.error(&bits, 3);
        let (gain, known) = (decibels(alone, fitted), case.known_gain);
        let plan = written(&family.tree, &bits);
        assert!((gain - known).abs() < 0.3, "{}: {gain} dB, known {known}; {plan}", case.name);
        assert!((fitted / expected - 1.0).abs() < 0.05, "{}: {fitted}, {expected}", case.name);
        // Never planned worse than without a tree.
        let own: f64 = predict(&family.tree, &flat, &family.gram, &free()).unwrap().iter().sum();
        assert!(expected <= own / deltas.len() as f64 * (1.0 + 1e-9), "{}", case.name);
        let mut last = f64::INFINITY;
        for passes in 0..4 {
            let error = family.error(&bits, passes);
            assert!(error <= last * (1.0 + 1e-9), "{} pass {passes}: {error} > {last}", case.name);
            last = error;
        }
    }
}

#[test]
fn one_model_is_rounded_to_nearest() {
    let (n_rows, n_cols) = (9, 300);
    let data = gaussian(1, "w", n_rows * n_cols);
    let delta = [MatrixRef::new(&data, n_rows, n_cols).unwrap()];
    for bits in 1..=8 {
        let nodes = [SiteNode { members: vec![0], bits }];
        let fit = Fit { group_size: GROUP, passes: 3 };
        let tree = encode_tree(&sources(&delta), &[1.0], &nodes, fit).unwrap();
        let codec: CodecSpec = format!("rtn:bits={bits},group_size={GROUP}").parse().unwrap();
        assert_eq!(tree.nodes, [codec.encode(&delta[0]).unwrap()], "{bits} bits");
        assert!(tree.gains[0].is_empty());
    }
}

#[test]
fn one_bit_is_the_sign_and_the_mean_magnitude() {
    let data = gaussian(2, "w", GROUP);
    let delta = [MatrixRef::new(&data, 1, GROUP).unwrap()];
    let nodes = [SiteNode { members: vec![0], bits: 1 }];
    let fit = Fit { group_size: GROUP, passes: 0 };
    let tree = encode_tree(&sources(&delta), &[1.0], &nodes, fit).unwrap();
    let mean = data.iter().map(|w| f64::from(w.abs())).sum::<f64>() / GROUP as f64;
    let PartData::BF16(scale) = part(&tree.nodes[0], "scale") else { panic!("scales are BF16") };
    assert!((f64::from(scale[0].to_f32()) / mean - 1.0).abs() < 1.0 / 256.0);
    for (w, decoded) in data.iter().zip(decoded(&tree.nodes[0], 1)) {
        assert_eq!(w.is_sign_positive(), decoded.is_sign_positive());
    }
}

#[test]
fn identical_models_have_all_bits_in_common_and_multiples_have_gains() {
    let (n_rows, n_cols) = (8, 256);
    let one = gaussian(3, "w", n_rows * n_cols);
    let factors = [1.0f32, -0.5, 3.0];
    let deltas: Vec<Vec<f32>> =
        factors.iter().map(|f| one.iter().map(|w| f * w).collect()).collect();
    let family = Measured::new(&deltas, n_rows, n_cols);
    let root = &family.tree.nodes()[family.tree.root()];
    assert!(root.height < 1e-9, "multiples have everything in common: {}", root.height);
    let (bits, expected) = family.plan(4.0 / 3.0);
    assert_eq!(written(&family.tree, &bits), "3×4");
    assert!((expected / expected_error(4, GROUP) - 1.0).abs() < 1e-6);
    let tree = family.encode(&bits, 2);
    for row in 0..n_rows {
        let gain = |i: usize| tree.gains[0][i][row].to_f32();
        for (i, factor) in factors.iter().enumerate() {
            let ratio = gain(i) / gain(0);
            assert!((ratio / factor - 1.0).abs() < 2e-3, "row {row}: {ratio}, expected {factor}");
        }
    }
}

#[test]
fn models_with_nothing_in_common_share_nothing() {
    let gram = Gram::zeros(5);
    let mut orthogonal = gram.clone();
    for i in 0..5 {
        // One model at a time: the inner products of a delta that is 1 for it and 0 for others.
        let mut rows = vec![vec![0.0f32; 16]; 5];
        rows[i] = vec![0.25; 16];
        let rows: Vec<MatrixRef<'_>> =
            rows.iter().map(|row| MatrixRef::new(row, 1, 16).unwrap()).collect();
        orthogonal.add(&Gram::of(&sources(&rows)).unwrap());
    }
    let tree = Tree::of(&orthogonal).unwrap();
    for choice in ladder(&tree, tree.root(), &orthogonal, &free()).unwrap() {
        let shared = tree.leaves().end..tree.nodes().len();
        assert!(choice.bits[shared].iter().all(|bits| *bits == 0), "{choice:?}");
    }
    let costs = Costs::new(GROUP, 4096);
    assert_eq!(groups(&tree, &orthogonal, &costs, 2.0).unwrap(), [0, 1, 2, 3, 4]);
}

/// Two relatives among strangers.
fn pair_and_strangers() -> Vec<Vec<f32>> {
    let n = 16 * 512;
    let common = gaussian(4, "common", n);
    let mut deltas: Vec<Vec<f32>> = (0..5).map(|i| gaussian(4, &format!("own {i}"), n)).collect();
    for i in [1, 4] {
        deltas[i].iter_mut().zip(&common).for_each(|(w, c)| *w = 0.3 * *w + c);
    }
    deltas
}

#[test]
fn relatives_are_found_and_strangers_left_alone() {
    let deltas = pair_and_strangers();
    let family = Measured::new(&deltas, 16, 512);
    assert_eq!(family.tree.nodes()[5].members, [1, 4]);
    let costs = Costs::new(GROUP, 512);
    let found = groups(&family.tree, &family.gram, &costs, 2.0).unwrap();
    let members: Vec<_> = found.iter().map(|v| &family.tree.nodes()[*v].members[..]).collect();
    assert_eq!(members, [&[0][..], &[2], &[3], &[1, 4]]);
    let below = family.tree.subtree(5);
    assert_eq!(below.nodes()[2].members, [0, 1]);
    assert_eq!(below.leaves(), 0..2);
}

/// The tree does not depend on the order of the models but for their numbers, nor the bytes on
/// the number of threads.
#[test]
fn trees_and_bytes_are_the_same_each_time() {
    let deltas = pair_and_strangers();
    let family = Measured::new(&deltas, 16, 512);
    let reversed: Vec<Vec<f32>> = deltas.iter().rev().cloned().collect();
    let backwards = Measured::new(&reversed, 16, 512);
    let members = |tree: &Tree, flip: bool| {
        let of = |m: &usize| if flip { 4 - m } else { *m };
        let mut all: Vec<Vec<usize>> =
            tree.nodes().iter().map(|node| node.members.iter().map(of).collect()).collect();
        all.iter_mut().for_each(|members| members.sort_unstable());
        all.sort();
        all
    };
    assert_eq!(members(&family.tree, false), members(&backwards.tree, true));
    let (bits, _) = family.plan(2.0);
    let on = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| (Measured::new(&deltas, 16, 512).gram, family.encode(&bits, 2)))
    };
    let ((gram, one), (other, four)) = (on(1), on(4));
    assert_eq!(gram, other);
    assert_eq!(one.nodes, four.nodes);
    assert_eq!(one.gains, four.gains);
    assert_eq!(one.errors, four.errors);
}

#[test]
fn a_new_model_takes_the_nodes_that_hold_it() {
    let deltas = pair_and_strangers();
    let (n_rows, n_cols) = (16, 512);
    let family = Measured::new(&deltas[..4], n_rows, n_cols);
    let (bits, _) = family.plan(3.0);
    let nodes = site_nodes(&family.tree, &bits);
    let tree = family.encode(&bits, 1);
    let loaded: Vec<Box<dyn DeltaLinear>> =
        tree.nodes.iter().zip(&nodes).map(|(delta, node)| prepared(delta, node.bits)).collect();
    let loaded: Vec<&dyn DeltaLinear> = loaded.iter().map(|node| &**node).collect();
    let new = MatrixRef::new(&deltas[4], n_rows, n_cols).unwrap();
    let own = nodes.iter().position(|node| node.members == [1]).unwrap();
    let other = nodes.iter().position(|node| node.members == [0]).unwrap();
    let paths = [vec![], vec![own], vec![other], vec![own, other], vec![own, own]];
    let (energy, left) = path_energy(&new, &loaded, &paths).unwrap();
    assert!((left[0] / energy - 1.0).abs() < 1e-9);
    assert!(left[1] < 0.3 * energy, "the relative holds most of it: {left:?} of {energy}");
    assert!(left[2] > 0.95 * energy, "a stranger does not");
    assert!(left[3] <= left[1]);
    assert!((left[4] / left[1] - 1.0).abs() < 1e-6, "a node twice holds no more");
    let gains = fitted_gains(&new, &loaded[own..=own]).unwrap();
    let path = SitePath { nodes: vec![loaded[own]], gains };
    let residual = Residual { delta: &new, path: &path };
    let (rest, _) = path_energy(&residual, &[], &[]).unwrap();
    assert!((rest / left[1] - 1.0).abs() < 1e-3, "gains are rounded to f16: {rest} {left:?}");
}

#[test]
fn budgets_are_kept_and_errors_fall_with_them() {
    let deltas = pair_and_strangers();
    let family = Measured::new(&deltas, 16, 512);
    let costs = Costs::new(GROUP, 512);
    let own = ladder(&family.tree, family.tree.root(), &family.gram, &costs).unwrap();
    for pair in own.windows(2) {
        assert!(pair[0].cost < pair[1].cost && pair[0].loss > pair[1].loss);
    }
    let sites = [(own.clone(), 1000), (own.clone(), 3000)];
    let mut last = f64::INFINITY;
    for bits in [6.0, 8.0, 10.5, 11.0, 20.0] {
        let budget = bits * 4000.0;
        let picks = share_out(&sites, budget);
        let at = |f: &dyn Fn(usize, usize) -> f64| -> f64 {
            picks.iter().enumerate().map(|(site, pick)| f(site, *pick)).sum()
        };
        let cost = at(&|site, pick| sites[site].0[pick].cost * sites[site].1 as f64);
        assert!(cost <= budget, "{cost} of {budget}");
        let loss = at(&|site, pick| sites[site].0[pick].loss);
        assert!(loss < last);
        last = loss;
    }
}

#[test]
fn what_is_wrong_with_a_delta_is_said_with_its_model() {
    let mut deltas = vec![vec![1.0f32; 64]; 3];
    deltas[2][33] = f32::NAN;
    let rows: Vec<MatrixRef<'_>> =
        deltas.iter().map(|d| MatrixRef::new(d, 2, 32).unwrap()).collect();
    let wrong = |(model, error): (usize, Error)| {
        assert_eq!(model, 2);
        assert!(matches!(error, Error::NotFinite { row: 1, column: 1, .. }), "{error}");
    };
    wrong(Gram::of(&sources(&rows)).unwrap_err());
    let nodes = [SiteNode { members: vec![0, 1, 2], bits: 2 }];
    let fit = Fit { group_size: 16, passes: 1 };
    wrong(encode_tree(&sources(&rows), &[1.0; 3], &nodes, fit).unwrap_err());
}

#[test]
fn options_are_read_and_refused() {
    let rqt: Rqt = "rqt:topology=matrix,group-size=64".parse().unwrap();
    assert_eq!(rqt.topology(), Topology::Matrix);
    assert_eq!(rqt.fit().group_size, 64);
    assert_eq!(rqt.to_string(), "rqt:topology=matrix,group_size=64,passes=3");
    assert_eq!(rqt.to_string().parse::<Rqt>().unwrap(), rqt);
    for (text, problem) in [
        ("rqt:group_size=17", "group_size"),
        ("rqt:depth=3", "depth"),
        ("rqt:passes=1,passes=2", "given twice"),
        ("rtn", "unknown codec"),
    ] {
        let error = text.parse::<Rqt>().unwrap_err().to_string();
        assert!(error.contains(problem), "{text}: {error}");
    }
}
