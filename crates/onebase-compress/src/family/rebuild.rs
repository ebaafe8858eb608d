use std::collections::BTreeMap;

use onebase_format::artifact::digest_of_tensors;
use onebase_format::family::{Family, FamilyManifest, NODES_FOLDER, TENANTS_FOLDER};

use crate::{Error, FamilyPlan, Member, Progress, Relatives, Result, build_family};

/// Where a family is built anew, in its own folder.
const REBUILD_FOLDER: &str = ".rebuild";

/// Checks that fine-tunes are those that all tenants of a family were made from.
///
/// # Errors
/// When a tenant has none among them, or was made from another.
pub fn check_originals(family: &Family, members: &[Member]) -> Result<()> {
    let by_name: BTreeMap<&str, &Member> =
        members.iter().map(|member| (member.name.as_str(), member)).collect();
    for name in family.tenants()? {
        let artifact = family.tenant(&name)?;
        let expected = artifact.manifest().fine_tune_blake3;
        let got = match by_name.get(name.as_str()) {
            None => None,
            Some(member) => {
                let names: Vec<&str> =
                    member.pair.specs().iter().map(|spec| spec.name.as_str()).collect();
                let digests = member.pair.fine_tune().digests(&names)?;
                Some(digest_of_tensors(names.into_iter().zip(digests)))
            }
        };
        if got.is_none() || got != expected {
            let expected = expected.map_or_else(|| "unknown".to_owned(), |d| d.to_string());
            let got = got.map(|digest| digest.to_string());
            return Err(Error::OtherOriginal { name, expected, got });
        }
    }
    Ok(())
}

/// Builds the tree of a family anew from its fine-tunes, never from decoded weights, and
/// puts each tenant in the place of the earlier one: whoever opens a tenant meanwhile has
/// either.
///
/// # Errors
/// When fine-tunes are missing or others than the tenants were made from, or something cannot
/// be read or written.
pub fn rebuild_family(
    family: &Family,
    members: &[Member],
    relatives: &Relatives,
    plan: &FamilyPlan,
    progress: &dyn Progress,
) -> Result<FamilyManifest> {
    let change = family.change()?;
    check_originals(family, members)?;
    let dir = family.dir().join(REBUILD_FOLDER);
    // What an interrupted one has left.
    change.discard(&dir)?;
    let manifest = build_family(members, relatives, plan, &dir, progress)?;
    change.take_nodes(&dir.join(NODES_FOLDER))?;
    for member in members {
        change.put_tenant(&member.name, &dir.join(TENANTS_FOLDER).join(&member.name))?;
    }
    change.set_manifest(&manifest)?;
    change.discard(&dir)?;
    change.remove_unnamed()?;
    Ok(manifest)
}
