/// The step that a Gauss-Newton iteration takes: the solution `d` of
/// `(A + damping · diag A) d = g`, where `A`, `[n, n]`, and `g`, `[n]`, are the leading
/// rows and the last row of `equations`, `[n + 1, n + 1]`, symmetric. By Cholesky's
/// decomposition; `None` where there is none, a number not being finite.
///
/// What changes no logit, a zero on the diagonal, gets no step.
pub(super) fn solve(equations: &[f64], n: usize, damping: f64) -> Option<Vec<f64>> {
    let at = |row: usize, column: usize| equations[row * (n + 1) + column];
    let used: Vec<usize> = (0..n).filter(|i| at(*i, *i) != 0.0).collect();
    let m = used.len();
    let mut lower = vec![0.0; m * m];
    for i in 0..m {
        for j in 0..=i {
            let own = at(used[i], used[j]);
            let value = if i == j { own * (1.0 + damping) } else { own };
            let products = lower[i * m..i * m + j].iter().zip(&lower[j * m..j * m + j]);
            let rest = value - products.map(|(a, b)| a * b).sum::<f64>();
            lower[i * m + j] = if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                rest.sqrt()
            } else {
                rest / lower[j * m + j]
            };
        }
    }
    let mut x = vec![0.0; m];
    for i in 0..m {
        let known: f64 = (0..i).map(|k| lower[i * m + k] * x[k]).sum();
        x[i] = (at(n, used[i]) - known) / lower[i * m + i];
    }
    for i in (0..m).rev() {
        let known: f64 = (i + 1..m).map(|k| lower[k * m + i] * x[k]).sum();
        x[i] = (x[i] - known) / lower[i * m + i];
    }
    let mut step = vec![0.0; n];
    used.iter().zip(&x).for_each(|(site, x)| step[*site] = *x);
    step.iter().all(|d| d.is_finite()).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_by_hand() {
        // A = [[4, 2, 0], [2, 3, 0], [0, 0, 0]], g = [2, 5, 7].
        let rows = [[4.0, 2.0, 0.0, 2.0], [2.0, 3.0, 0.0, 5.0], [0.0; 4], [2.0, 5.0, 7.0, 9.0]];
        let step = solve(&rows.concat(), 3, 0.0).unwrap();
        let want = [-0.5, 2.0, 0.0];
        assert!(step.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{step:?}");
        let damped = solve(&rows.concat(), 3, 1e9).unwrap();
        assert!(damped.iter().all(|d| d.abs() < 1e-8));
        assert_eq!(solve(&[9.0], 0, 1.0), Some(vec![]));
    }

    #[test]
    fn what_is_no_such_system_has_no_step() {
        let singular = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(solve(&singular, 2, 0.0), None);
        assert!(solve(&singular, 2, 1e-3).is_some());
        assert_eq!(solve(&[f64::NAN; 4], 1, 1e-3), None);
        assert_eq!(solve(&[1.0, f64::INFINITY, f64::INFINITY, 1.0], 1, 1e-3), None);
    }
}
