//! GPTQ against a transcription of the paper's program in f64, and what must hold of it.

use onebase_codec::Error;
use onebase_codec::numerics::{
    ColumnOrder, DAMPING, Grid, HessianFactor, RangeGrid, ScaleFormat, gptq, gram, zero_loss,
};
use onebase_tensor::stream;
use rand_distr::{Distribution, StandardNormal};

fn gaussian(label: &str, n: usize) -> Vec<f32> {
    let mut rng = stream(11, label, 0);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// The second moment of correlated inputs of very different sizes; every `dead`th is zero.
fn moment(n: usize, dead: Option<usize>) -> Vec<f32> {
    let n_tokens = 2 * n;
    let common = gaussian("common", n_tokens);
    let own = gaussian("own", n_tokens * n);
    let sizes = gaussian("sizes", n);
    let x: Vec<f64> = (0..n_tokens * n)
        .map(|at| {
            let (t, j) = (at / n, at % n);
            let alive = dead.is_none_or(|dead| j % dead != dead - 1);
            let x = (own[at] + 1.5 * common[t]) * sizes[j].exp();
            if alive { f64::from(x) } else { 0.0 }
        })
        .collect();
    #[allow(clippy::cast_possible_truncation)]
    gram(&x, [n_tokens, n]).0.iter().map(|x| *x as f32).collect()
}

/// The lower Cholesky factor.
fn cholesky(a: &[f64], n: usize) -> Vec<f64> {
    let mut l = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            let rest = a[i * n + j] - sum;
            l[i * n + j] = if i == j { rest.sqrt() } else { rest / l[j * n + j] };
        }
    }
    l
}

/// The inverse of a positive definite matrix, column by column.
fn inverse(a: &[f64], n: usize) -> Vec<f64> {
    let l = cholesky(a, n);
    let mut out = vec![0.0; n * n];
    for column in 0..n {
        let mut x = vec![0.0; n];
        for i in 0..n {
            let sum: f64 = (0..i).map(|k| l[i * n + k] * x[k]).sum();
            x[i] = (if i == column { 1.0 } else { 0.0 } - sum) / l[i * n + i];
        }
        for i in (0..n).rev() {
            let sum: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
            x[i] = (x[i] - sum) / l[i * n + i];
        }
        (0..n).for_each(|i| out[i * n + column] = x[i]);
    }
    out
}

/// What the paper's program says of one matrix.
struct Expected {
    values: Vec<f64>,
    loss: Vec<f64>,
    /// How near the nearest tie of a row was, in steps.
    margin: Vec<f64>,
}

/// The paper's program, column by column with `T`, in f64.
struct Oracle {
    n: usize,
    perm: Vec<usize>,
    dead: Vec<bool>,
    /// `Tᵀ`.
    l: Vec<f64>,
    /// The damped matrix, columns as they are.
    h: Vec<f64>,
}

impl Oracle {
    fn new(h: &[f32], n: usize, order: ColumnOrder) -> Self {
        let mut h: Vec<f64> = h.iter().map(|x| f64::from(*x)).collect();
        let mut perm: Vec<usize> = (0..n).collect();
        if order == ColumnOrder::Activation {
            perm.sort_by(|a, b| h[b * n + b].total_cmp(&h[a * n + a]));
        }
        #[allow(clippy::cast_precision_loss)]
        let mean = (0..n).map(|j| h[j * n + j]).sum::<f64>() / n as f64;
        let dead: Vec<bool> = (0..n).map(|j| h[j * n + j] == 0.0).collect();
        (0..n).for_each(|j| {
            h[j * n + j] = if dead[j] { mean } else { h[j * n + j] };
            h[j * n + j] += DAMPING * mean;
        });
        let permuted: Vec<f64> = (0..n * n).map(|at| h[perm[at / n] * n + perm[at % n]]).collect();
        let l = cholesky(&inverse(&permuted, n), n);
        Self { n, perm, dead, l, h }
    }

    /// Rounds `w`; without a grid, to zero.
    fn round(&self, w: &[f32], grid: Option<&Grid<'_>>) -> Expected {
        let Self { n, perm, dead, l, .. } = self;
        let n = *n;
        let t = |i: usize, j: usize| l[j * n + i];
        let (mut values, mut loss, mut margins) = (vec![0.0; w.len()], Vec::new(), Vec::new());
        for (r, original) in w.chunks(n).enumerate() {
            let alive = |j: usize| if dead[j] { 0.0 } else { f64::from(original[j]) };
            let mut row: Vec<f64> = perm.iter().map(|j| alive(*j)).collect();
            let (mut scale, mut zero, mut lost, mut margin) = (0.0, 0.0, 0.0, 0.5f64);
            for j in 0..n {
                let value = row[j];
                let q = match grid {
                    None => 0.0,
                    Some(Grid::Steps { bits, rows, columns }) => {
                        // There is no level of zero for what is never used.
                        let at = perm[j];
                        let value = if dead[at] { f64::from(original[at]) } else { value };
                        let step = f64::from(rows[r]) * f64::from(columns[perm[j]]);
                        let most = f64::from((1u32 << bits[perm[j]]) - 1);
                        let code = ((value / step + most) / 2.0).clamp(0.0, most);
                        margin = margin.min((code.fract() - 0.5).abs());
                        step * (2.0 * code.round() - most)
                    }
                    Some(Grid::Signed { n_low, bits, scales }) => {
                        let part = usize::from(perm[j] >= *n_low);
                        let half = f64::from(1u32 << (bits[part] - 1));
                        let scale = f64::from(scales[r][part]);
                        let code = (value / scale).clamp(-half, half - 1.0);
                        margin = margin.min((code.fract().abs() - 0.5).abs());
                        scale * code.round()
                    }
                    Some(Grid::Range(grid)) => {
                        let g = grid.group_size;
                        let group: Vec<f64> = if g >= n {
                            original.iter().map(|w| f64::from(*w)).collect()
                        } else if grid.static_groups {
                            let first = perm[j] / g * g;
                            (first..n.min(first + g)).map(alive).collect()
                        } else if j % g == 0 {
                            row[j..n.min(j + g)].to_vec()
                        } else {
                            Vec::new()
                        };
                        let most = f64::from((1u32 << grid.bits) - 1);
                        if !group.is_empty() {
                            let mut lo = group.iter().fold(0.0, |l: f64, w| l.min(*w));
                            let mut hi = group.iter().fold(0.0, |h: f64, w| h.max(*w));
                            if grid.symmetric {
                                hi = hi.max(-lo);
                                lo = if lo < 0.0 { -hi } else { lo };
                            }
                            if lo == 0.0 && hi == 0.0 {
                                (lo, hi) = (-1.0, 1.0);
                            }
                            scale = (hi - lo) / most;
                            let exact = -lo / scale;
                            zero = exact.round_ties_even();
                            if grid.symmetric {
                                zero = f64::from(1u32 << (grid.bits - 1));
                            } else {
                                margin = margin.min(((exact - exact.floor()) - 0.5).abs());
                            }
                        }
                        let exact = value / scale;
                        margin = margin.min(((exact - exact.floor()) - 0.5).abs());
                        scale * ((exact.round_ties_even() + zero).clamp(0.0, most) - zero)
                    }
                };
                let e = (value - q) / t(j, j);
                lost += if dead[perm[j]] { 0.0 } else { e * e / 2.0 };
                (j..n).for_each(|k| row[k] -= e * t(j, k));
                values[r * n + perm[j]] = q;
            }
            loss.push(lost);
            margins.push(margin);
        }
        Expected { values, loss, margin: margins }
    }
}

fn range(bits: u32, group_size: usize) -> RangeGrid {
    let scales = ScaleFormat::F32;
    RangeGrid { bits, group_size, symmetric: false, static_groups: false, scales }
}

const ORDERS: [ColumnOrder; 2] = [ColumnOrder::Index, ColumnOrder::Activation];

/// Largest distance of two lists.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |d, (a, b)| d.max((f64::from(*a) - b).abs()))
}

#[test]
fn it_is_the_program_of_the_paper() {
    let (mut n_ties, mut n_all) = (0, 0);
    for (n, dead) in [(1, None), (40, Some(7)), (300, Some(50)), (391, None)] {
        let n_rows = if n == 40 { 37 } else { 3 };
        let w = gaussian("w", n_rows * n);
        let h = moment(n, dead);
        let rows: Vec<f32> = gaussian("rows", n_rows).iter().map(|x| x.abs() + 0.3).collect();
        let columns: Vec<f32> = gaussian("columns", n).iter().map(|x| (x / 3.0).exp()).collect();
        let scales: Vec<[f32; 2]> = rows.iter().map(|x| [x * 0.8, x * 0.2]).collect();
        let mut grids = Vec::new();
        for bits in [1, 2, 3, 4, 8] {
            for group_size in [1, 7, 16, 96, 128, 130, 200, 256, 391, 1000] {
                for (symmetric, static_groups) in [(false, false), (true, false), (false, true)] {
                    let grid = RangeGrid { symmetric, static_groups, ..range(bits, group_size) };
                    grids.push(Grid::Range(grid));
                }
            }
        }
        let mixed: Vec<u8> = (0..n).map(|j| [3, 1, 8, 2, 4][j % 5]).collect();
        let widths = [1, 2, 3, 4, 8].map(|bits| vec![bits; n]).into_iter().chain([mixed]);
        let widths: Vec<_> = widths.collect();
        for bits in &widths {
            grids.push(Grid::Steps { bits, rows: &rows, columns: &columns });
        }
        grids.push(Grid::Signed { n_low: n - n / 8, bits: [3, 5], scales: &scales });
        for order in ORDERS {
            let factor = HessianFactor::new(&h, n, order, DAMPING).unwrap();
            let oracle = Oracle::new(&h, n, order);
            let all = oracle.round(&w, None).loss;
            for grid in &grids {
                let want = oracle.round(&w, Some(grid));
                let got = gptq(&w, &factor, grid);
                let values = grid.values(&got, &factor);
                let rows = values.chunks(n).zip(want.values.chunks(n));
                for (r, (values, expected)) in rows.enumerate() {
                    n_all += 1;
                    // A tie that rounds to the other side changes all that follows.
                    if want.margin[r] < 1e-4 {
                        n_ties += 1;
                        continue;
                    }
                    let off = distance(values, expected);
                    assert!(off < 1e-4, "{n} {order:?} {grid:?}: {off}");
                    let (got, want) = (got.loss[r], want.loss[r]);
                    assert!(
                        (got - want).abs() < 1e-4 * want + 1e-9 * all[r],
                        "{grid:?}: {got} {want}"
                    );
                }
            }
        }
    }
    assert!(n_ties < n_all / 4, "{n_ties} of {n_all} rows have ties");
}

/// `½ δᵀ H δ` of each row of `δ`.
fn quadratic(delta: &[f64], h: &[f64], n: usize) -> Vec<f64> {
    let of = |d: &[f64]| (0..n * n).map(|at| d[at / n] * h[at] * d[at % n]).sum::<f64>() / 2.0;
    delta.chunks(n).map(of).collect()
}

/// `fixtures/make_gptq.py` says what is in the file. No value in it is near a tie.
#[test]
fn it_is_what_pytorch_computes() {
    let bytes = std::fs::read("tests/golden-gptq/gptq.safetensors").unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> Vec<f32> {
        let (floats, rest) = file.tensor(name).unwrap().data().as_chunks();
        assert!(rest.is_empty());
        floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let (w, h) = (read("w"), read("h"));
    let n = h.len().isqrt();
    let names = file.names();
    let cases: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix("q.")).collect();
    assert_eq!(cases.len(), 29);
    for case in cases {
        let (q, loss) = (read(&format!("q.{case}")), read(&format!("loss.{case}")));
        let [bits, group, order, groups, symmetry] = case.split('.').collect::<Vec<_>>()[..] else {
            panic!("{case}")
        };
        let order = match order {
            "index" => ColumnOrder::Index,
            "activation" => ColumnOrder::Activation,
            _ => panic!("{case}"),
        };
        let factor = HessianFactor::new(&h, n, order, DAMPING).unwrap();
        assert_eq!(factor.n_dead(), 3);
        let got = if bits == "0" {
            zero_loss(&w, &factor)
        } else {
            let group_size = if group == "0" { n } else { group.parse().unwrap() };
            let (symmetric, static_groups) = (symmetry == "symmetric", groups == "static");
            let bits = bits.parse().unwrap();
            let grid =
                Grid::Range(RangeGrid { symmetric, static_groups, ..range(bits, group_size) });
            let got = gptq(&w, &factor, &grid);
            // An eighth of a step of 8 bits is a hundred times as much.
            let wide: Vec<f64> = q.iter().map(|q| f64::from(*q)).collect();
            let off = distance(&grid.values(&got, &factor), &wide);
            assert!(off < 2e-5, "{case}: {off}");
            got.loss
        };
        for (got, want) in got.iter().zip(&loss) {
            assert!((got / f64::from(*want) - 1.0).abs() < 1e-4, "{case}: {got} {want}");
        }
    }
}

#[test]
fn the_loss_is_the_quadratic_form_of_the_errors() {
    let (n, n_rows) = (210, 40);
    let (w, h) = (gaussian("w", n_rows * n), moment(n, None));
    for order in ORDERS {
        let factor = HessianFactor::new(&h, n, order, DAMPING).unwrap();
        let oracle = Oracle::new(&h, n, order);
        #[allow(clippy::cast_precision_loss)]
        let mean = (0..n).map(|j| f64::from(h[j * n + j])).sum::<f64>() / n as f64;
        assert_eq!(factor.damping(), DAMPING);
        assert!((factor.lambda() / (DAMPING * mean) - 1.0).abs() < 1e-12);
        let all = zero_loss(&w, &factor);
        let wide: Vec<f64> = w.iter().map(|w| f64::from(*w)).collect();
        let by_program = oracle.round(&w, None).loss;
        for ((got, want), program) in all.iter().zip(quadratic(&wide, &oracle.h, n)).zip(by_program)
        {
            assert!((got / want - 1.0).abs() < 1e-5, "{got} {want}");
            assert!((got / program - 1.0).abs() < 1e-5, "{got} {program}");
        }
        for bits in [2, 3, 4, 8] {
            for group_size in [32, 128, n] {
                let grid = Grid::Range(range(bits, group_size));
                let got = gptq(&w, &factor, &grid);
                let values = grid.values(&got, &factor);
                let delta: Vec<f64> =
                    w.iter().zip(&values).map(|(w, q)| f64::from(w - q)).collect();
                let want = quadratic(&delta, &oracle.h, n);
                for (got, want) in got.loss.iter().zip(want) {
                    assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
                }
            }
        }
    }
}

#[test]
fn errors_weigh_less_than_those_of_the_nearest_values() {
    let (n, n_rows) = (200, 20);
    let (w, h) = (gaussian("w", n_rows * n), moment(n, None));
    let oracle = Oracle::new(&h, n, ColumnOrder::Index);
    let factor = HessianFactor::new(&h, n, ColumnOrder::Activation, DAMPING).unwrap();
    let identity = HessianFactor::identity(n);
    for bits in [2, 3, 4] {
        let grid = Grid::Range(range(bits, 64));
        let lost = |factor: &HessianFactor| {
            let values = grid.values(&gptq(&w, factor, &grid), factor);
            let delta: Vec<f64> = w.iter().zip(&values).map(|(w, q)| f64::from(w - q)).collect();
            quadratic(&delta, &oracle.h, n).iter().sum::<f64>()
        };
        assert!(lost(&factor) < 0.5 * lost(&identity));
    }
}

#[test]
fn without_data_the_nearest_is_taken() {
    let (n, n_rows) = (150, 33);
    let w = gaussian("w", n_rows * n);
    let factor = HessianFactor::identity(n);
    let mut unit = vec![0f32; n * n];
    (0..n).for_each(|j| unit[j * n + j] = 1.0);
    let (rows, columns) = (vec![0.5; n_rows], vec![0.25; n]);
    let grids = [
        Grid::Range(range(3, 32)),
        Grid::Range(range(3, n)),
        Grid::Range(range(2, 140)),
        Grid::Steps { bits: &vec![3; n], rows: &rows, columns: &columns },
        Grid::Signed { n_low: 131, bits: [3, 3], scales: &vec![[0.5, 0.25]; n_rows] },
    ];
    for grid in &grids {
        let got = gptq(&w, &factor, grid);
        let values = grid.values(&got, &factor);
        for (r, (row, values)) in w.chunks(n).zip(values.chunks(n)).enumerate() {
            let mut loss = 0.0;
            for (j, (w, q)) in row.iter().zip(values).enumerate() {
                loss += f64::from(w - q).powi(2) / 2.0;
                let level = |code: u8| match grid {
                    Grid::Range(grid) => {
                        let at = r * grid.n_groups(n) + j / grid.group_size;
                        got.scale[at] * (f32::from(code) - f32::from(got.zero[at]))
                    }
                    Grid::Steps { .. } => 0.125 * (2.0 * f32::from(code) - 7.0),
                    Grid::Signed { n_low, scales, .. } => {
                        scales[r][usize::from(j >= *n_low)] * (f32::from(code) - 4.0)
                    }
                };
                let n_levels =
                    if matches!(grid, Grid::Range(RangeGrid { bits: 2, .. })) { 4 } else { 8 };
                let nearest = (0..n_levels).map(|code| (w - level(code)).abs());
                let nearest = nearest.fold(f32::INFINITY, f32::min);
                assert!((w - q).abs() <= nearest + 1e-6, "{w} {q} {nearest}");
            }
            assert!((got.loss[r] / loss - 1.0).abs() < 1e-6);
        }
        for order in ORDERS {
            let factor = HessianFactor::new(&unit, n, order, 0.0).unwrap();
            assert_eq!(gptq(&w, &factor, grid), got);
        }
    }
    let want = w.chunks(n).map(|w| w.iter().map(|w| f64::from(w * w)).sum::<f64>() / 2.0);
    for (got, want) in zero_loss(&w, &factor).iter().zip(want) {
        assert!((got / want - 1.0).abs() < 1e-6);
    }
}

#[test]
fn any_number_of_threads_and_any_unit_of_the_moment_give_the_same_codes() {
    let (n, n_rows) = (300, 130);
    let (w, h) = (gaussian("w", n_rows * n), moment(n, Some(40)));
    let on = |threads, unit: f32| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let h: Vec<f32> = h.iter().map(|x| x * unit).collect();
        pool.install(|| {
            let factor = HessianFactor::new(&h, n, ColumnOrder::Activation, DAMPING).unwrap();
            (gptq(&w, &factor, &Grid::Range(range(3, 150))), zero_loss(&w, &factor))
        })
    };
    let first = on(1, 1.0);
    assert!(first == on(5, 1.0));
    for unit in [2f32.powi(-60), 2f32.powi(40)] {
        let (mut got, zero) = on(2, unit);
        got.loss.iter_mut().for_each(|loss| *loss /= f64::from(unit));
        assert!(got == first.0);
        let zero: Vec<f64> = zero.iter().map(|loss| loss / f64::from(unit)).collect();
        assert!(zero == first.1);
    }
}

#[test]
fn a_moment_of_a_few_inputs_is_damped_as_much_as_it_needs() {
    // Eigenvalues −0.05 and 2.05, and −4 and 6.
    let slightly = [1.0, 1.05, 1.05, 1.0];
    let factor = HessianFactor::new(&slightly, 2, ColumnOrder::Index, DAMPING).unwrap();
    assert!((factor.damping() - 0.1).abs() < 1e-12 && (factor.lambda() - 0.1).abs() < 1e-12);
    let factor = HessianFactor::new(&slightly, 2, ColumnOrder::Index, 0.0).unwrap();
    assert!((factor.damping() - 0.1).abs() < 1e-12);
    let got = HessianFactor::new(&[1.0, 5.0, 5.0, 1.0], 2, ColumnOrder::Index, DAMPING);
    assert!(matches!(got, Err(Error::NotPositiveDefinite { n: 2, damping }) if damping > 0.9));
    for bad in [f32::NAN, f32::INFINITY] {
        let got = HessianFactor::new(&[1.0, 0.0, bad, 1.0], 2, ColumnOrder::Index, DAMPING);
        assert!(matches!(got, Err(Error::Overflow { row: 1, column: 0, .. })));
    }
    // One direction alone.
    let factor = HessianFactor::new(&[4.0; 100], 10, ColumnOrder::Activation, DAMPING).unwrap();
    assert_eq!(factor.damping(), DAMPING);
    assert_eq!(factor.order(), Some(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9][..]));
}

#[test]
fn columns_without_input_are_zero_or_nearest_and_cost_nothing() {
    let (n, n_rows) = (140, 3);
    let w = gaussian("w", n_rows * n);
    let (rows, columns) = (vec![0.5; n_rows], vec![0.25; n]);
    for (h, n_dead) in [(vec![0.0; n * n], n), (moment(n, Some(20)), 7)] {
        for order in ORDERS {
            let factor = HessianFactor::new(&h, n, order, DAMPING).unwrap();
            assert_eq!(factor.n_dead(), n_dead);
            if order == ColumnOrder::Activation {
                let order = factor.order().unwrap();
                assert!(order[n - n_dead..].iter().all(|column| factor.is_dead(*column)));
            }
            for grid in [Grid::Range(range(4, 32)), Grid::Range(range(4, n))] {
                let values = grid.values(&gptq(&w, &factor, &grid), &factor);
                let dead = (0..values.len()).filter(|at| factor.is_dead(at % n));
                assert_eq!(dead.clone().count(), n_rows * n_dead);
                assert!(dead.into_iter().all(|at| values[at] == 0.0));
            }
            let bits = vec![2; n];
            let steps = Grid::Steps { bits: &bits, rows: &rows, columns: &columns };
            let alive = w.iter().enumerate();
            let alive: Vec<f32> =
                alive.map(|(at, w)| if factor.is_dead(at % n) { 0.0 } else { *w }).collect();
            // Where no level is zero it is the nearest one, and the others know nothing of it.
            let (got, without) = (gptq(&w, &factor, &steps), gptq(&alive, &factor, &steps));
            assert_eq!(got.loss, without.loss);
            let nearest = gptq(&w, &HessianFactor::identity(n), &steps).codes;
            for at in 0..w.len() {
                let codes = if factor.is_dead(at % n) { &nearest } else { &without.codes };
                assert_eq!(got.codes[at], codes[at]);
            }
            if n_dead == n {
                assert_eq!(zero_loss(&w, &factor), [0.0; 3]);
                assert_eq!(gptq(&w, &factor, &steps).loss, [0.0; 3]);
            }
        }
    }
}

#[test]
fn codes_are_those_of_the_scale_that_is_stored() {
    let (n, n_rows) = (160, 5);
    let (w, h) = (gaussian("w", n_rows * n), moment(n, None));
    let factor = HessianFactor::new(&h, n, ColumnOrder::Activation, DAMPING).unwrap();
    for (size, group_size) in [(1.0, 32), (1e-3, 140), (1e-7, n), (1e-12, 32), (1e9, 32)] {
        let w: Vec<f32> = w.iter().map(|w| w * size).collect();
        let grid = RangeGrid { scales: ScaleFormat::F16, ..range(4, group_size) };
        let got = gptq(&w, &factor, &Grid::Range(grid));
        for scale in &got.scale {
            assert_eq!(half::f16::from_f32(*scale).to_f32(), *scale);
        }
        let values = Grid::Range(grid).values(&got, &factor);
        assert!(values.iter().all(|value| value.is_finite()));
        assert!(got.codes.iter().chain(&got.zero).all(|code| *code < 16));
        let oracle = Oracle::new(&h, n, ColumnOrder::Activation);
        let delta: Vec<f64> = w.iter().zip(&values).map(|(w, q)| f64::from(w - q)).collect();
        for (got, want) in got.loss.iter().zip(quadratic(&delta, &oracle.h, n)) {
            assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        }
    }
}

#[test]
fn nothing_is_rounded_to_nothing() {
    let none = HessianFactor::new::<f32>(&[], 0, ColumnOrder::Activation, DAMPING).unwrap();
    assert!(gptq(&[], &none, &Grid::Range(range(3, 5))).codes.is_empty());
    let factor = HessianFactor::new(&moment(9, None), 9, ColumnOrder::Index, DAMPING).unwrap();
    let grid = Grid::Steps { bits: &[1; 9], rows: &[], columns: &[1.0; 9] };
    assert!(gptq(&[], &factor, &grid).loss.is_empty());
    let zero = gptq(&[0.0; 9], &factor, &Grid::Range(range(3, 4)));
    assert_eq!((zero.loss, zero.codes), (vec![0.0], vec![zero.zero[0]; 9]));
}
