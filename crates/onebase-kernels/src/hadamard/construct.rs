//! Hadamard matrices: `M Mᵀ = K I`, of ones with signs.
//!
//! Sylvester's doubling, Paley's two constructions over finite fields (R. Paley, "On Orthogonal
//! Matrices", 1933), and Kronecker products of all these.

/// A square matrix of ones with signs, row-major.
pub(super) struct Signs {
    pub(super) order: usize,
    pub(super) signs: Vec<i8>,
}

/// The Hadamard matrix of an order, if one of the constructions gives it. Which one a matrix comes
/// from, and so its every sign, is the same for ever: weights on disk are multiplied with it.
pub(super) fn hadamard(order: usize) -> Option<Signs> {
    match order {
        0 => None,
        1 => Some(Signs { order, signs: vec![1] }),
        2 => Some(Signs { order, signs: vec![1, 1, 1, -1] }),
        _ if !order.is_multiple_of(4) => None,
        _ => paley_one(order).or_else(|| paley_two(order)).or_else(|| product(order)),
    }
}

/// Order `q + 1` for a prime power `q` that is 3 modulo 4: `I + S` with a skew conference matrix.
fn paley_one(order: usize) -> Option<Signs> {
    let field = Field::new(order - 1).filter(|field| field.size % 4 == 3)?;
    let mut signs = conference(&field);
    // The border of ones is skew as well.
    (1..order).for_each(|row| signs[row * order] = -1);
    (0..order).for_each(|row| signs[row * order + row] = 1);
    Some(Signs { order, signs })
}

/// Order `2 (q + 1)` for a prime power `q` that is 1 modulo 4: a symmetric conference matrix with
/// its ones replaced by `[[1, 1], [1, −1]]` and its zeros by `[[1, −1], [−1, −1]]`.
fn paley_two(order: usize) -> Option<Signs> {
    let field = Field::new(order / 2 - 1).filter(|field| field.size % 4 == 1)?;
    let conference = conference(&field);
    let sign = |at: usize| {
        let (row, col) = (at / order, at % order);
        let inner = [row % 2, col % 2];
        match conference[row / 2 * (order / 2) + col / 2] {
            0 => {
                if inner == [0, 0] {
                    1
                } else {
                    -1
                }
            }
            one => {
                if inner == [1, 1] {
                    -one
                } else {
                    one
                }
            }
        }
    };
    Some(Signs { order, signs: (0..order * order).map(sign).collect() })
}

/// A Kronecker product with the smallest factor that gives one.
fn product(order: usize) -> Option<Signs> {
    let factors = (2..order).filter(|factor| order.is_multiple_of(*factor));
    factors.filter(|factor| factor * factor <= order).find_map(|factor| {
        let (outer, inner) = (hadamard(order / factor)?, hadamard(factor)?);
        let sign = |at: usize| {
            let (row, col) = (at / order, at % order);
            let outer = outer.signs[row / factor * outer.order + col / factor];
            outer * inner.signs[row % factor * factor + col % factor]
        };
        Some(Signs { order, signs: (0..order * order).map(sign).collect() })
    })
}

/// `[q + 1, q + 1]` with a border of ones, whose other elements say whether the difference of the
/// row's and the column's element of the field is a square (1), zero (0) or neither (−1).
fn conference(field: &Field) -> Vec<i8> {
    let order = field.size + 1;
    let mut signs = vec![1; order * order];
    signs[0] = 0;
    for row in 0..field.size {
        for col in 0..field.size {
            signs[(row + 1) * order + col + 1] = field.character[field.difference(row, col)];
        }
    }
    signs
}

/// A finite field: the number of an element has its coefficients as digits to the base
/// `characteristic`, the constant one lowest.
struct Field {
    size: usize,
    characteristic: usize,
    /// For each element whether it is a square (1), zero (0) or neither (−1).
    character: Vec<i8>,
}

impl Field {
    /// `None` unless `size` is a power of an odd prime.
    fn new(size: usize) -> Option<Self> {
        let prime = (3..=size).find(|p| size.is_multiple_of(*p))?;
        if size.is_multiple_of(2) {
            return None;
        }
        let top = std::iter::successors(Some(1), |power| Some(power * prime));
        let top = top.take_while(|power| *power < size).last()?;
        if top * prime != size {
            return None;
        }
        let mut field = Self { size, characteristic: prime, character: Vec::new() };
        // A root of one of the polynomials generates all elements but zero.
        field.character = (1..size).find_map(|tail| field.squares(top, tail))?;
        Some(field)
    }

    /// The character, if the powers of `x` are all elements but zero where its power of the
    /// field's degree is `tail`; `top` is the number of the power before.
    fn squares(&self, top: usize, tail: usize) -> Option<Vec<i8>> {
        let mut character = vec![0; self.size];
        let mut power = 1;
        for exponent in 0..self.size - 1 {
            if character[power] != 0 {
                return None;
            }
            character[power] = if exponent % 2 == 0 { 1 } else { -1 };
            let (lead, rest) = (power / top, power % top);
            power = self.sum(rest * self.characteristic, tail, lead);
        }
        (power == 1).then_some(character)
    }

    /// `a + factor · b`.
    fn sum(&self, a: usize, b: usize, factor: usize) -> usize {
        let mut place = 1;
        let mut sum = 0;
        while place < self.size {
            let digit =
                a / place % self.characteristic + factor * (b / place % self.characteristic);
            sum += digit % self.characteristic * place;
            place *= self.characteristic;
        }
        sum
    }

    fn difference(&self, a: usize, b: usize) -> usize {
        self.sum(a, b, self.characteristic - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_every_matrix_are_orthogonal() {
        let mut orders = Vec::new();
        for order in 1..=300 {
            if let Some(Signs { signs, .. }) = hadamard(order) {
                check(order, &signs);
                orders.push(order);
            }
        }
        // All multiples of four but those that need other constructions.
        let missing: Vec<_> = (1..=75).map(|i| 4 * i).filter(|n| !orders.contains(n)).collect();
        assert_eq!(missing, [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]);
        for order in [344, 924] {
            check(order, &hadamard(order).unwrap().signs);
        }
    }

    fn check(order: usize, signs: &[i8]) {
        assert!(signs.len() == order * order && signs.iter().all(|s| s.abs() == 1), "{order}");
        for (index, row) in signs.chunks(order).enumerate() {
            for (other_index, other) in signs.chunks(order).enumerate().skip(index) {
                let dot: i32 = row.iter().zip(other).map(|(a, b)| i32::from(a * b)).sum();
                assert_eq!(dot, if index == other_index { order as i32 } else { 0 }, "{order}");
            }
        }
    }

    /// Weights on disk have been multiplied with these.
    #[test]
    fn matrices_stay_what_they_are() {
        for (order, expected) in
            [(12, 199660280), (20, 280744778), (28, 931710536), (76, 915616477), (36, 522342699)]
        {
            let matrix = hadamard(order).unwrap();
            // A polynomial of the signs, modulo a prime.
            let sum = matrix
                .signs
                .iter()
                .fold(7u64, |sum, sign| (sum * 31 + u64::from(*sign > 0)) % 1_000_000_007);
            assert_eq!(sum, expected, "{order}");
        }
    }
}
