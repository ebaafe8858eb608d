//! Orthogonal matrices at random.

use onebase_tensor::Stream;
use rand_distr::{Distribution, StandardNormal};

use super::{inverse_of_cholesky, product_of_columns, product_transposed};

/// Steps that make a matrix orthogonal to the last bits: the first leaves an error that grows
/// with the square of the matrix's condition.
const STEPS: usize = 3;

/// An orthogonal matrix `[n, n]`, row-major, each as likely as any other (Haar's measure): the
/// factor `Q` of `G = Q R` with a positive diagonal of `R`, for `G` of standard normal draws.
///
/// `R` is the Cholesky factor of `Gᵀ G`; everything runs on the calling thread.
pub fn random_orthogonal(n: usize, draws: &mut Stream) -> Vec<f64> {
    loop {
        let drawn: Vec<f64> = (0..n * n).map(|_| StandardNormal.sample(draws)).collect();
        let orthogonal = (0..STEPS).try_fold(drawn, |a, _| {
            let (inverse, _) = inverse_of_cholesky(&product_of_columns(&a, &a, [n; 3]), n)?;
            Some(product_transposed(&a, &inverse, [n; 3]))
        });
        // One that is singular to rounding is drawn about never.
        if let Some(orthogonal) = orthogonal {
            return orthogonal;
        }
    }
}

#[cfg(test)]
mod tests {
    use onebase_tensor::stream;

    use super::*;

    #[test]
    fn columns_are_orthonormal_and_follow_the_seed() {
        for n in [0, 1, 2, 7, 64, 150] {
            let q = random_orthogonal(n, &mut stream(3, "orthogonal", 0));
            let gram = product_of_columns(&q, &q, [n; 3]);
            for (at, got) in gram.iter().enumerate() {
                let expected = if at % (n + 1) == 0 { 1.0 } else { 0.0 };
                assert!((got - expected).abs() < 1e-13, "{n}: {got} at {at}");
            }
            assert_eq!(q, random_orthogonal(n, &mut stream(3, "orthogonal", 0)));
        }
        let [a, b] = [0, 1].map(|i| random_orthogonal(4, &mut stream(3, "orthogonal", i)));
        assert_ne!(a, b);
    }
}
