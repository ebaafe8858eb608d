use std::path::{Path, PathBuf};

use onebase_format::artifact::MANIFEST_FILE;
use onebase_format::family::Family;

/// A tenant that was found in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name: that of its folder.
    pub name: String,
    /// The artifact's folder.
    pub source: PathBuf,
}

/// The artifacts in a folder, and those of the families in it or that it is, by name.
///
/// # Errors
/// When the folder or a family cannot be read.
pub fn find_tenants(folder: &Path) -> onebase_format::Result<Vec<Found>> {
    let mut found = Vec::new();
    if Family::is_at(folder) {
        family(folder, &mut found)?;
        return Ok(found);
    }
    let io = |source| onebase_format::Error::Io { action: "read", path: folder.to_owned(), source };
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let source = entry.map_err(io)?.path();
        let Some(name) = source.file_name().and_then(|name| name.to_str()).map(str::to_owned)
        else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        if Family::is_at(&source) {
            family(&source, &mut found)?;
        } else if source.join(MANIFEST_FILE).is_file() {
            found.push(Found { name, source });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn family(folder: &Path, found: &mut Vec<Found>) -> onebase_format::Result<()> {
    let family = Family::open(folder)?;
    for name in family.tenants()? {
        let source = family.tenant_folder(&name)?;
        found.push(Found { name, source });
    }
    Ok(())
}
