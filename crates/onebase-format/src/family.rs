//! Families: several tenants' artifacts in one folder, with the nodes that they share.
//!
//! `tenants/NAME` is an artifact as any other, whose manifest names files of codes by their
//! digests; they lie in `nodes/DIGEST.safetensors`. A file of nodes never changes, so that
//! what is added or removed touches no other tenant. See `SPEC.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::artifact::{
    Artifact, BaseRecord, CodecRecord, FileRecord, MANIFEST_FILE, Manifest, read_versioned,
};
use crate::atomic::{Lock, rename, write_file};
use crate::checkpoint::plain_name;
use crate::error::Error;
use crate::safetensors_file::{SafetensorsFile, file_digest};
use crate::{Digest, Result};

/// The manifest's file name.
pub const FAMILY_FILE: &str = "onebase-family.json";

/// The folder of the tenants' artifacts.
pub const TENANTS_FOLDER: &str = "tenants";

/// The folder of the nodes.
pub const NODES_FOLDER: &str = "nodes";

/// The value of `format` in every manifest.
pub const FAMILY_FORMAT: &str = "onebase-family";

/// The newest version of the format that this program reads, and the one that it writes.
pub const FAMILY_VERSION: u32 = 1;

/// How the name ends of a tenant's folder that makes room for another.
const REPLACED: &str = ".replaced";

/// What a family says of itself. What its tenants are is said by the folder of tenants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FamilyManifest {
    /// [`FAMILY_FORMAT`].
    pub format: String,
    /// At most [`FAMILY_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// The base that all tenants are made against.
    pub base: BaseRecord,
    /// How nodes were chosen and written.
    pub codec: CodecRecord,
    /// How much the fine-tunes had in common when the tree was built.
    pub similarity: Similarity,
    /// What is known of the nodes, by digest.
    pub nodes: BTreeMap<Digest, NodeRecord>,
}

/// Cosines of the deltas of several fine-tunes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Similarity {
    /// Their names.
    pub tenants: Vec<String>,
    /// A row for each, over all linear sites.
    pub cosines: Vec<Vec<f64>>,
}

/// What is known of a node since it was written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Bits of its codes, a mean over the weights of all linear sites; where they are no plain
    /// codes, of all that its file holds.
    pub bits: f64,
    /// The relative squared error of the linear sites' delta down to this node, of each
    /// tenant that it was written for.
    pub errors: BTreeMap<String, f64>,
}

/// A family's folder.
#[derive(Debug)]
pub struct Family {
    dir: PathBuf,
    manifest: FamilyManifest,
}

impl Family {
    /// Whether a folder is a family's.
    pub fn is_at(dir: &Path) -> bool {
        dir.join(FAMILY_FILE).is_file()
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// When it is none of a family, or the manifest is malformed, of another format or newer.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(FAMILY_FILE);
        if !path.is_file() {
            return Err(Error::NotA {
                path: dir.to_owned(),
                expected: "family",
                missing: FAMILY_FILE,
            });
        }
        let (manifest, _) = read_versioned(&path, FAMILY_FORMAT, FAMILY_VERSION)?;
        Ok(Self { dir: dir.to_owned(), manifest })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &FamilyManifest {
        &self.manifest
    }

    /// The tenants' names, in their order.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn tenants(&self) -> Result<Vec<String>> {
        tenants_in(&self.dir.join(TENANTS_FOLDER))
    }

    /// Where a tenant's artifact is.
    ///
    /// # Errors
    /// When the name is no file name.
    pub fn tenant_folder(&self, name: &str) -> Result<PathBuf> {
        tenant_folder(&self.dir, name)
    }

    /// A tenant's artifact.
    ///
    /// # Errors
    /// When there is no such tenant, or it cannot be opened.
    pub fn tenant(&self, name: &str) -> Result<Artifact> {
        let folder = self.tenant_folder(name)?;
        if !folder.join(MANIFEST_FILE).is_file() {
            let (family, got) = (self.dir.clone(), name.to_owned());
            return Err(Error::NoTenant { family, got, known: self.tenants()? });
        }
        Artifact::open(&folder)
    }

    /// Where a node is.
    pub fn node_path(&self, node: Digest) -> PathBuf {
        self.dir.join(NODES_FOLDER).join(node_name(node))
    }

    /// The right to change the family, which one process has at a time. What an interrupted
    /// one has left is removed.
    ///
    /// # Errors
    /// When another process has it.
    pub fn change(&self) -> Result<FamilyChange<'_>> {
        let lock = Lock::take(&self.dir, &self.dir)?;
        // As it is now that nobody else changes it.
        let manifest = Self::open(&self.dir)?.manifest;
        let change = FamilyChange { family: self, manifest, _lock: lock };
        for folder in [TENANTS_FOLDER, NODES_FOLDER] {
            for path in entries(&self.dir.join(folder))? {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
                let Some(rest) = name.as_deref().and_then(|name| name.strip_prefix('.')) else {
                    continue;
                };
                match rest.strip_suffix(REPLACED) {
                    // Nobody came into its place.
                    Some(tenant) if !path.with_file_name(tenant).exists() => {
                        rename(&path, &path.with_file_name(tenant))?;
                    }
                    _ => remove(&path)?,
                }
            }
        }
        Ok(change)
    }
}

/// A family that is being changed, see [`Family::change`].
#[derive(Debug)]
pub struct FamilyChange<'a> {
    family: &'a Family,
    manifest: FamilyManifest,
    _lock: Lock,
}

impl FamilyChange<'_> {
    /// The manifest as it was when the change began.
    pub fn manifest(&self) -> &FamilyManifest {
        &self.manifest
    }

    /// Where a node is written before its digest is known.
    pub fn new_node_path(&self, number: usize) -> PathBuf {
        self.family.dir.join(NODES_FOLDER).join(format!(".{number}.partial"))
    }

    /// Gives a node that was written its name.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn name_node(&self, number: usize, node: Digest) -> Result<()> {
        let from = self.new_node_path(number);
        rename(&from, &self.family.node_path(node))
    }

    /// Writes the manifest in place of the one that is there.
    ///
    /// # Errors
    /// When it cannot be written; it is then as it was.
    pub fn set_manifest(&self, manifest: &FamilyManifest) -> Result<()> {
        write_family(&self.family.dir, manifest)
    }

    /// Removes a tenant, at once for whoever looks, and then the nodes that no other names.
    ///
    /// # Errors
    /// When there is no such tenant, or something cannot be removed.
    pub fn remove_tenant(&self, name: &str) -> Result<Vec<Digest>> {
        self.family.tenant(name)?;
        let folder = self.family.tenant_folder(name)?;
        let gone = folder.with_file_name(format!(".{name}.removed"));
        rename(&folder, &gone)?;
        remove(&gone)?;
        self.remove_unnamed()
    }

    /// Moves the files of a folder to the nodes; those that are there already are the same.
    ///
    /// # Errors
    /// When one cannot be renamed.
    pub fn take_nodes(&self, folder: &Path) -> Result<()> {
        for from in entries(folder)? {
            if let Some(name) = from.file_name() {
                rename(&from, &self.family.dir.join(NODES_FOLDER).join(name))?;
            }
        }
        Ok(())
    }

    /// Removes a folder in the family's, if it is there.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(&self, folder: &Path) -> Result<()> {
        if folder.exists() { remove(folder) } else { Ok(()) }
    }

    /// Puts an artifact in a tenant's place.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn put_tenant(&self, name: &str, from: &Path) -> Result<()> {
        let folder = self.family.tenant_folder(name)?;
        let gone = folder.with_file_name(format!(".{name}{REPLACED}"));
        let is_there = folder.exists();
        if is_there {
            rename(&folder, &gone)?;
        }
        rename(from, &folder)?;
        if is_there { remove(&gone) } else { Ok(()) }
    }

    /// Removes the nodes that no tenant names, from the manifest too.
    ///
    /// # Errors
    /// When a tenant's manifest cannot be read: its nodes are not known then, and all stay.
    pub fn remove_unnamed(&self) -> Result<Vec<Digest>> {
        let mut named = BTreeSet::new();
        for tenant in self.family.tenants()? {
            let path = self.family.tenant_folder(&tenant)?.join(MANIFEST_FILE);
            let (manifest, _): (Manifest, _) = read_manifest(&path)?;
            named.extend(manifest.nodes.iter().map(|node| node.blake3));
        }
        let mut removed = Vec::new();
        for path in entries(&self.family.dir.join(NODES_FOLDER))? {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let Some(Ok(node)) = stem.map(|stem| stem.parse::<Digest>()) else { continue };
            if !named.contains(&node) {
                remove(&path)?;
                removed.push(node);
            }
        }
        let mut manifest = Family::open(&self.family.dir)?.manifest;
        let known = manifest.nodes.len();
        manifest.nodes.retain(|node, _| named.contains(node));
        if manifest.nodes.len() < known {
            self.set_manifest(&manifest)?;
        }
        Ok(removed)
    }
}

/// Writes a family's manifest into its folder.
///
/// # Errors
/// When it cannot be written.
pub fn write_family(dir: &Path, manifest: &FamilyManifest) -> Result<()> {
    let path = dir.join(FAMILY_FILE);
    let text = serde_json::to_string_pretty(manifest)
        .map_err(|source| Error::Json { path: path.clone(), source })?;
    write_file(&path, format!("{text}\n").as_bytes())
}

/// Where the artifact of a tenant of the family in a folder is.
///
/// # Errors
/// When the name is no file name, or begins with a dot.
pub fn tenant_folder(dir: &Path, name: &str) -> Result<PathBuf> {
    let folder = dir.join(TENANTS_FOLDER);
    if name.starts_with('.') {
        return Err(Error::UnsafeName { path: folder, name: name.to_owned() });
    }
    let name = plain_name(&folder, name)?;
    Ok(folder.join(name))
}

/// The file name of a node.
pub fn node_name(node: Digest) -> String {
    format!("{node}.safetensors")
}

fn read_manifest(path: &Path) -> Result<(Manifest, Digest)> {
    read_versioned(path, crate::artifact::FORMAT, crate::artifact::FORMAT_VERSION)
}

/// Where the nodes of an artifact lie.
fn nodes_of(artifact: &Path) -> PathBuf {
    artifact.join("..").join("..").join(NODES_FOLDER)
}

/// Opens a node that the artifact in a folder names.
pub(crate) fn open_node(artifact: &Path, record: &FileRecord) -> Result<SafetensorsFile> {
    let path = nodes_of(artifact).join(node_name(record.blake3));
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() == record.bytes => SafetensorsFile::open(&path),
        Ok(metadata) => Err(Error::Node {
            tenants: tenants_of(artifact, record.blake3),
            problem: format!("has {} bytes, expected {}", metadata.len(), record.bytes),
            path,
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(Error::Node {
            tenants: tenants_of(artifact, record.blake3),
            problem: "is missing".to_owned(),
            path,
        }),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Compares the digest of a node that the artifact in a folder names.
pub(crate) fn check_node(artifact: &Path, record: &FileRecord, path: &Path) -> Result<()> {
    let got = file_digest(path)?;
    if got == record.blake3 {
        return Ok(());
    }
    Err(Error::Node {
        path: path.to_owned(),
        problem: format!("has the digest {got}"),
        tenants: tenants_of(artifact, record.blake3),
    })
}

/// The tenants of the family of an artifact that name a node, as far as they can be read.
fn tenants_of(artifact: &Path, node: Digest) -> Vec<String> {
    let folder = artifact.join("..");
    let names = |tenant: &String| {
        let manifest = read_manifest(&folder.join(tenant).join(MANIFEST_FILE));
        manifest.is_ok_and(|(manifest, _)| manifest.nodes.iter().any(|n| n.blake3 == node))
    };
    tenants_in(&folder).unwrap_or_default().into_iter().filter(names).collect()
}

fn tenants_in(folder: &Path) -> Result<Vec<String>> {
    let names = entries(folder)?.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        (!name.starts_with('.') && path.join(MANIFEST_FILE).is_file()).then_some(name)
    });
    Ok(names.collect())
}

/// What is in a folder, in the order of the names.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = || Error::io("read", folder);
    let read = std::fs::read_dir(folder).map_err(io())?;
    let mut paths = Vec::new();
    for entry in read {
        paths.push(entry.map_err(io())?.path());
    }
    paths.sort();
    Ok(paths)
}

fn remove(path: &Path) -> Result<()> {
    let removed =
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.map_err(Error::io("remove", path))
}
