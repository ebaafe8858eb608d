use crate::{Error, Result};

/// Longest name.
const NAME_BYTES: usize = 128;

/// Names that an unknown one is told beside.
const N_NEAREST: usize = 3;

/// Checks that a name can be written in a path, a header and a label as it is.
///
/// # Errors
/// When it cannot.
pub fn check_name(name: &str) -> Result<()> {
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':' | '@' | '+');
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES {
        "it is longer than 128 bytes"
    } else if !name.chars().all(plain) {
        "expected letters, digits and -_./:@+ only"
    } else {
        return Ok(());
    };
    Err(Error::BadName { name: name.chars().take(NAME_BYTES).collect(), problem })
}

/// The names that are most like another, the most alike first.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<String> {
    let name: String = name.chars().take(NAME_BYTES).collect();
    let alike = known.map(|known| (strsim::jaro_winkler(&name, known), known));
    let mut alike: Vec<_> = alike.filter(|(likeness, _)| *likeness > 0.6).collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    alike.into_iter().take(N_NEAREST).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for good in ["math", "org/model-7b:v1.2", "a"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a b", "naïve", "x\n", &"a".repeat(129)] {
            assert!(matches!(check_name(bad), Err(Error::BadName { .. })), "{bad:?}");
        }
    }

    #[test]
    fn the_nearest_come_first() {
        let known = ["math", "mathematics", "chat", "code"];
        assert_eq!(nearest("mth", known.into_iter())[0], "math");
        assert!(nearest("zzz", known.into_iter()).is_empty());
    }
}
