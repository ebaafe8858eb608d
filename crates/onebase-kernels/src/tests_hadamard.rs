use crate::tests::random;
use crate::{Backend, Hadamard};

/// Hidden and feed-forward sizes of models, and small ones.
const SIZES: [usize; 26] = [
    1, 2, 4, 8, 12, 20, 24, 40, 64, 96, 128, 256, 768, 896, 1536, 2560, 3072, 3584, 4864, 5632,
    8192, 8960, 9728, 11008, 14336, 29568,
];

#[test]
fn transforms_are_orthogonal_and_alike() {
    for n in SIZES {
        let hadamard = Hadamard::new(n).unwrap_or_else(|| panic!("a transform of {n}"));
        assert_eq!(hadamard.n_inputs(), n);
        let row = random("row", n);
        let mut wide: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        let length: f64 = wide.iter().map(|v| v * v).sum();
        hadamard.apply_f64(&mut wide);
        let got: f64 = wide.iter().map(|v| v * v).sum();
        assert!((got / length - 1.0).abs() < 1e-12, "{n}: {got}, {length}");
        let mut first: Option<Vec<f32>> = None;
        for backend in Backend::available() {
            let mut rows = [row.clone(), row.clone(), row.clone()].concat();
            backend.hadamard_rows(&hadamard, &mut rows);
            let (one, others) = rows.split_at(n);
            assert!(one == &others[..n] && one == &others[n..], "{n}");
            let bound = 1e-6 * length.sqrt();
            for (got, expected) in one.iter().zip(&wide) {
                assert!((f64::from(*got) - expected).abs() < bound, "{n} {}", backend.name());
            }
            assert_eq!(first.get_or_insert_with(|| one.to_vec()).as_slice(), one, "{n}");
            backend.hadamard_transposed_rows(&hadamard, &mut rows);
            for (got, expected) in rows.iter().zip(row.iter().cycle()) {
                assert!(f64::from((got - expected).abs()) < bound.max(1e-6), "{n}");
            }
        }
    }
    // An odd number, and what needs a construction that is not here.
    assert!([0, 3, 7, 42, 92 * 11].iter().all(|n| Hadamard::new(*n).is_none()));
}

#[test]
fn a_block_of_ones_own_must_be_orthogonal() {
    let root = 3f32.sqrt();
    // A permutation with signs, scaled.
    let block = [0.0, root, 0.0, 0.0, 0.0, -root, root, 0.0, 0.0];
    let hadamard = Hadamard::with_block(96, &block, 3).unwrap();
    let mut row = random("row", 96);
    let expected = row.clone();
    for backend in Backend::available() {
        backend.hadamard_rows(&hadamard, &mut row);
        backend.hadamard_transposed_rows(&hadamard, &mut row);
    }
    assert!(row.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
    let mut bent = block;
    bent[0] = 0.1;
    for (n, block, k) in [(96, &bent, 3), (95, &block, 3), (36, &block, 3), (96, &block, 2)] {
        assert!(Hadamard::with_block(n, block, k).is_none(), "{n} {k}");
    }
    assert!(Hadamard::with_block(96, &[f32::NAN; 9], 3).is_none());
    assert!(Hadamard::with_block(96, &[], 0).is_none());
}
