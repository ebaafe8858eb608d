use std::borrow::Borrow;
use std::cmp::Reverse;

use onebase_codec::CodecSpec;
use onebase_codec::rqt::{
    Choice, Costs, FixedLeaf, Gram, Rqt, Topology, Tree, expected_error, groups, ladder, predict,
    share_out,
};
use onebase_format::artifact::{
    CodecRecord, FileRecord, Names, StoredTensor, part_name, predicted_sizes,
};
use onebase_format::family::node_name;
use onebase_format::{Digest, TensorEntry, tensor_file_bytes};
use onebase_model::TensorSpec;
use rayon::prelude::*;

use super::measure::SiteRelatives;
use crate::budget::Known;
use crate::compress::codec_record;
use crate::model_card::model_card;
use crate::{Budget, Error, Member, Plan, Relatives, Result, TablePlan, VectorPlan};

/// How a family is to be stored.
#[derive(Clone, Debug)]
pub struct FamilyOptions {
    /// The tree.
    pub rqt: Rqt,
    /// The codec of what each fine-tune has of its own at linear sites; codes of the tree,
    /// whose bits are planned with it, where there is none.
    pub leaf: Option<CodecSpec>,
    /// What is done with embeddings and head.
    pub tables: TablePlan,
    /// What is done with norms and biases.
    pub vectors: VectorPlan,
}

/// Which nodes a family has, and their codes at each site.
#[derive(Clone, Debug)]
pub struct FamilyPlan {
    pub(crate) options: FamilyOptions,
    /// Shared ones before those of one fine-tune, parents before their children.
    pub(crate) nodes: Vec<Vec<usize>>,
    /// In the order of the forward pass.
    pub(crate) sites: Vec<SitePlan>,
    /// Positions of the fine-tunes that share codes with each other and with nobody else.
    pub groups: Vec<Vec<usize>>,
    /// The relative squared error of each fine-tune's delta to be expected.
    pub expected_errors: Vec<f64>,
}

/// A family's plan, and what its fine-tunes would be alone.
#[derive(Clone, Debug)]
pub struct FamilyPlans {
    /// The plan.
    pub shared: FamilyPlan,
    /// That of as many bytes for each group without shared codes.
    pub alone: FamilyPlan,
}

/// The codes at one linear site.
#[derive(Clone, Debug)]
pub(crate) struct SitePlan {
    /// Position among the tensors.
    pub(crate) index: usize,
    pub(crate) shape: [usize; 2],
    pub(crate) unchanged: Vec<bool>,
    /// Positions among the plan's nodes, ascending, and bits; of a leaf with a codec of its
    /// own, 0.
    pub(crate) nodes: Vec<(usize, usize)>,
}

impl FamilyPlans {
    /// The plans with the most bits with which a family is within a budget on disk.
    ///
    /// Groups of relatives share codes where none of them is expected to lose by it. A budget
    /// of bits or a share holds for each group, and so on average for all; of bytes, each
    /// group has its part by the size of its fine-tunes. So relatives spend what they save on
    /// themselves, and a fine-tune among strangers is stored as it would be alone.
    ///
    /// # Errors
    /// When no plan is within the budget, a decomposition does not converge, or the size of
    /// the leaves' codec is not known before.
    pub fn within(
        members: &[Member],
        relatives: &Relatives,
        options: &FamilyOptions,
        budget: Budget,
    ) -> Result<Self> {
        let planner = Planner::new(members, relatives, options, budget)?;
        let tree = relatives.tree();
        let mut alone = Vec::new();
        let mut bits = 0.0;
        for leaf in tree.leaves() {
            let group = planner.group(&tree.nodes()[leaf].members, None)?;
            let (choices, own_bits) = planner.fit(&group)?;
            bits += own_bits;
            alone.push((group, choices));
        }
        #[allow(clippy::cast_precision_loss)]
        let bits = bits / members.len() as f64;
        let alone_plan = planner.plan(&alone)?;
        let mut alone: Vec<Option<(Group, Vec<usize>)>> = alone.into_iter().map(Some).collect();
        let mut shared = Vec::new();
        for root in planner.roots(bits)? {
            let members = &tree.nodes()[root].members;
            if let [member] = members[..] {
                shared.extend(alone[member].take());
                continue;
            }
            let group = planner.group(members, Some(root))?;
            let (choices, _) = planner.fit(&group)?;
            let expected = planner.losses(&group, &choices)?;
            let is_worse = |(member, loss): (&usize, &f64)| {
                *loss > alone_plan.expected_errors[*member] * TOLERANCE
            };
            if members.iter().zip(&expected).any(is_worse) {
                shared.extend(members.iter().filter_map(|member| alone[*member].take()));
            } else {
                shared.push((group, choices));
            }
        }
        Ok(Self { shared: planner.plan(&shared)?, alone: alone_plan })
    }
}

/// By how much a fine-tune in a group may be worse than alone: what the last step of bits of
/// a site makes.
const TOLERANCE: f64 = 1.005;

/// Fine-tunes that share codes, or one, and what can be chosen for them.
struct Group {
    members: Vec<usize>,
    /// By site: the tree and what its models have in common, by their positions in the group.
    trees: Vec<(Tree, Gram, Costs)>,
    /// By site, with its weights.
    ladders: Vec<(Vec<Choice>, usize)>,
}

struct Planner<'a> {
    members: &'a [Member],
    relatives: &'a Relatives,
    options: &'a FamilyOptions,
    budget: Budget,
    known: Vec<Known>,
}

impl<'a> Planner<'a> {
    fn new(
        members: &'a [Member],
        relatives: &'a Relatives,
        options: &'a FamilyOptions,
        budget: Budget,
    ) -> Result<Self> {
        let known = members.iter().map(|member| Known::of(&member.pair));
        let known = known.collect::<Result<_>>()?;
        Ok(Self { members, relatives, options, budget, known })
    }

    fn explain(&self, source: onebase_codec::Error) -> Error {
        self.members[0].pair.explain_family(source)
    }

    fn costs(&self, shape: [usize; 2]) -> Result<Costs> {
        let mut costs = Costs::new(self.options.rqt.fit().group_size, shape[1]);
        let leaf = self.options.leaf.as_ref();
        costs.leaf = leaf.map(|leaf| fixed_leaf(leaf, shape)).transpose()?;
        Ok(costs)
    }

    /// The nodes of the family's tree whose fine-tunes share codes.
    fn roots(&self, bits_per_weight: f64) -> Result<Vec<usize>> {
        let tree = self.relatives.tree();
        let sites = self.relatives.sites.iter();
        let widest = sites.max_by_key(|site| site.shape[0] * site.shape[1]);
        let (Some(widest), false) = (widest, self.options.rqt.topology() == Topology::Flat) else {
            return Ok(tree.leaves().collect());
        };
        let costs = self.costs(widest.shape)?;
        let all = self.relatives.normed();
        groups(tree, &all, &costs, bits_per_weight).map_err(|e| self.explain(e))
    }

    /// What can be chosen for some fine-tunes, below a node of the family's tree or one alone.
    fn group(&self, members: &[usize], root: Option<usize>) -> Result<Group> {
        let tree = self.relatives.tree();
        let of_site = |site: &SiteRelatives| -> Result<_> {
            // An error counts by what it is of the weights that it is added to.
            let factor = vec![1.0 / site.base_energy.max(f64::MIN_POSITIVE).sqrt(); members.len()];
            let gram = self.relatives.scaled(site).of_members(members).scaled(&factor);
            let costs = self.costs(site.shape)?;
            let own = match (root, self.options.rqt.topology()) {
                (Some(root), Topology::Family | Topology::Flat) => Ok(tree.subtree(root)),
                (None, _) | (_, Topology::Matrix) => Tree::of(&gram),
            };
            let own = own.map_err(|e| self.explain(e))?;
            let ladder = ladder(&own, own.root(), &gram, &costs).map_err(|e| self.explain(e))?;
            Ok(((own, gram, costs), (ladder, site.shape[0] * site.shape[1])))
        };
        let sites = self.relatives.sites.par_iter().map(of_site).collect::<Result<Vec<_>>>()?;
        let (trees, ladders) = sites.into_iter().unzip();
        Ok(Group { members: members.to_vec(), trees, ladders })
    }

    /// The choices with the most bits with which a group is within its budget, and these bits
    /// per weight of each of its fine-tunes.
    #[allow(clippy::cast_precision_loss)]
    fn fit(&self, group: &Group) -> Result<(Vec<usize>, f64)> {
        let weights = self.relatives.n_weights() * group.members.len();
        let at = |bits: f64| share_out(&group.ladders, bits * weights as f64);
        let limit = self.limit(&group.members);
        let size = |choices: &Vec<usize>| -> Result<f64> {
            let plan = self.plan(&[(group, choices.clone())])?;
            self.size(&plan, &group.members)
        };
        let least = at(0.0);
        let least_size = size(&least)?;
        if least_size > limit {
            return Err(Error::OverBudget {
                budget: self.budget.to_string(),
                codec: self.options.rqt.to_string(),
                least: self.in_unit(least_size, &group.members),
            });
        }
        let (mut low, mut high, mut best) = (0.0, 16.0, least);
        // A step is far less than the bits of the smallest site by then.
        for _ in 0..24 {
            let middle = f64::midpoint(low, high);
            let choices = at(middle);
            if choices == best {
                low = middle;
            } else if size(&choices)? <= limit {
                (low, best) = (middle, choices);
            } else {
                high = middle;
            }
        }
        Ok((best, low))
    }

    /// The errors to be expected of a group's fine-tunes.
    fn losses(&self, group: &Group, choices: &[usize]) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; group.members.len()];
        for (at, choice) in choices.iter().enumerate() {
            let (tree, gram, costs) = &group.trees[at];
            let bits = &group.ladders[at].0[*choice].bits;
            let losses = predict(tree, bits, gram, costs).map_err(|e| self.explain(e))?;
            let energy = self.relatives.sites[at].base_energy;
            sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss * energy);
        }
        Ok(sums)
    }

    /// The plan of groups with a choice for each site.
    fn plan(&self, groups: &[(impl Borrow<Group>, Vec<usize>)]) -> Result<FamilyPlan> {
        let sites = &self.relatives.sites;
        let mut chosen: Vec<Vec<(Vec<usize>, usize)>> = vec![Vec::new(); sites.len()];
        let mut expected_errors = vec![0.0; self.members.len()];
        for (group, choices) in groups {
            let group: &Group = group.borrow();
            let losses = self.losses(group, choices)?;
            for (member, loss) in group.members.iter().zip(losses) {
                expected_errors[*member] = loss;
            }
            for (at, choice) in choices.iter().enumerate() {
                let bits = &group.ladders[at].0[*choice].bits;
                let nodes = group.trees[at].0.nodes().iter().zip(bits);
                for (node, bits) in nodes.filter(|(_, bits)| **bits > 0) {
                    let members = node.members.iter().map(|m| group.members[*m]).collect();
                    chosen[at].push((members, usize::from(*bits)));
                }
                if self.options.leaf.is_some() {
                    let own = group.members.iter().filter(|m| !sites[at].unchanged[**m]);
                    chosen[at].extend(own.map(|member| (vec![*member], 0)));
                }
            }
        }
        let key = |members: &Vec<usize>| (Reverse(members.len()), members.clone());
        let mut nodes: Vec<_> = chosen.iter().flatten().map(|(m, _)| key(m)).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let sites = sites.iter().zip(chosen).map(|(site, chosen)| {
            let position = |(members, bits): (Vec<usize>, usize)| {
                (nodes.binary_search(&key(&members)).unwrap_or_default(), bits)
            };
            let mut nodes: Vec<(usize, usize)> = chosen.into_iter().map(position).collect();
            nodes.sort_unstable();
            let (index, shape, unchanged) = (site.index, site.shape, site.unchanged.clone());
            SitePlan { index, shape, unchanged, nodes }
        });
        let sites = sites.collect();
        let nodes = nodes.iter().map(|(_, members)| members.clone()).collect();
        let groups = groups.iter().map(|(group, _)| group.borrow().members.clone());
        let groups = groups.filter(|members| members.len() > 1).collect();
        Ok(FamilyPlan { options: self.options.clone(), nodes, sites, groups, expected_errors })
    }

    /// What a group may take, in what the budget is of: bits or bytes.
    #[allow(clippy::cast_precision_loss)]
    fn limit(&self, group: &[usize]) -> f64 {
        let bytes = |members: &mut dyn Iterator<Item = usize>| -> f64 {
            members.map(|m| self.members[m].pair.fine_tune().size_bytes() as f64).sum()
        };
        let own = bytes(&mut group.iter().copied());
        let part = own / bytes(&mut (0..self.members.len()));
        // What the whole family has beside its groups.
        let manifest = manifest_bytes(self.members) as f64;
        match self.budget {
            Budget::BitsPerWeight(bits) => bits,
            Budget::Share(share) => share * own - part * manifest,
            Budget::Bytes(bytes) => part * (bytes as f64 - manifest),
        }
    }

    /// What the fine-tunes of a plan take, in what the budget is of, to the byte where codecs
    /// say their sizes.
    #[allow(clippy::cast_precision_loss)]
    fn size(&self, plan: &FamilyPlan, group: &[usize]) -> Result<f64> {
        let blake3 = Digest::of(b"");
        let mut nodes = Vec::new();
        for node in 0..plan.nodes.len() {
            let entries = plan.entries(node, self.members[0].pair.specs())?;
            let bytes = tensor_file_bytes(node_name(blake3).as_ref(), &entries)?;
            nodes.push(FileRecord { bytes, blake3 });
        }
        let all: u64 = nodes.iter().map(|node| node.bytes).sum();
        let (mut total, mut linear) = (all, all);
        let rest = plan.rest();
        for at in group {
            let (pair, known) = (&self.members[*at].pair, &self.known[*at]);
            let own = plan.nodes_of(*at);
            let mut tensors = known.tensors(pair, &rest)?;
            for site in &plan.sites {
                if !site.unchanged[*at] {
                    let path = plan.path(*at, &own, site)?;
                    tensors[site.index] =
                        StoredTensor::path(Known::origin(pair, site.index)?, path);
                }
            }
            let own: Vec<FileRecord> = own.into_iter().map(|node| nodes[node].clone()).collect();
            let names = Names { nodes: &own, ..known.names() };
            let tensors: Vec<&StoredTensor> = tensors.iter().collect();
            let of_tenant = predicted_sizes(names, &tensors, known.side_files(), model_card)?;
            let named: u64 = own.iter().map(|node| node.bytes).sum();
            total += of_tenant.total_bytes - named;
            linear += of_tenant.linear_bytes - named;
        }
        Ok(match self.budget {
            Budget::BitsPerWeight(_) => {
                8.0 * linear as f64 / (self.relatives.n_weights() * group.len()).max(1) as f64
            }
            Budget::Share(_) | Budget::Bytes(_) => total as f64,
        })
    }

    /// A size in the unit of the budget, rounded up so that it can be asked for.
    #[allow(clippy::cast_precision_loss)]
    fn in_unit(&self, size: f64, group: &[usize]) -> String {
        let up = |value: f64| (value * 1000.0).ceil() / 1000.0;
        let scale = match self.budget {
            Budget::BitsPerWeight(_) => return format!("{}bpw", up(size)),
            // As much more as this group needs.
            Budget::Share(share) => share / self.limit(group),
            Budget::Bytes(bytes) => bytes as f64 / self.limit(group),
        };
        match self.budget {
            Budget::Share(_) => format!("about {}%", up(100.0 * size * scale)),
            _ => format!("about {:.0}B", (size * scale).ceil()),
        }
    }
}

/// The most bytes that a family's manifest takes.
fn manifest_bytes(members: &[Member]) -> usize {
    /// What a number takes at most, with its comma and indentation.
    const NUMBER: usize = 40;
    let names: usize = members.iter().map(|member| member.name.len() + NUMBER).sum();
    let n = members.len();
    // The base's record, the options, and of each of at most two nodes a fine-tune its digest.
    1024 + n * n * NUMBER + names * (2 * n + 1) + 2 * n * (64 + 2 * NUMBER)
}

impl FamilyPlan {
    /// The codec of a node's codes at a site.
    pub(crate) fn codec(&self, bits: usize) -> Result<CodecSpec> {
        match &self.options.leaf {
            Some(leaf) if bits == 0 => Ok(leaf.clone()),
            _ => match self.options.rqt.node_codec(bits) {
                Ok(codec) => Ok(codec),
                Err(_) => unreachable!("plans have bits that codecs have"),
            },
        }
    }

    /// What a manifest says of the tree.
    pub(crate) fn codec_record(&self) -> CodecRecord {
        let mut options = self.options.rqt.options().to_json().clone();
        if let Some(leaf) = &self.options.leaf {
            options.insert("leaf".to_owned(), leaf.to_string().into());
        }
        CodecRecord { name: Rqt::NAME.to_owned(), version: Rqt::VERSION, options }
    }

    /// How the tensors that are in no node are stored.
    pub(crate) fn rest(&self) -> Plan {
        let linear = match self.codec(1) {
            Ok(codec) => codec,
            Err(_) => unreachable!("one bit is a code"),
        };
        Plan::new(linear, self.options.tables.clone(), self.options.vectors.clone())
    }

    /// Positions of the nodes that a fine-tune has on its path, at any site.
    pub(crate) fn nodes_of(&self, member: usize) -> Vec<usize> {
        let mut nodes: Vec<usize> = self
            .sites
            .iter()
            .filter(|site| !site.unchanged[member])
            .flat_map(|site| site.nodes.iter().map(|(node, _)| *node))
            .filter(|node| self.nodes[*node].contains(&member))
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// A fine-tune's path at a site: positions among its nodes, codecs, and whether there are
    /// gains.
    pub(crate) fn path(
        &self,
        member: usize,
        own_nodes: &[usize],
        site: &SitePlan,
    ) -> Result<Vec<(usize, CodecRecord, bool)>> {
        let mut path = Vec::new();
        for (node, bits) in &site.nodes {
            let members = &self.nodes[*node];
            if members.contains(&member) {
                let Ok(at) = own_nodes.binary_search(node) else {
                    unreachable!("it is on the way")
                };
                path.push((at, codec_record(&self.codec(*bits)?), members.len() > 1));
            }
        }
        Ok(path)
    }

    /// What the file of a node holds.
    pub(crate) fn entries(&self, node: usize, specs: &[TensorSpec]) -> Result<Vec<TensorEntry>> {
        let mut entries = Vec::new();
        for site in &self.sites {
            let Some((_, bits)) = site.nodes.iter().find(|(at, _)| *at == node) else { continue };
            let codec = self.codec(*bits)?;
            let Some(parts) = codec.parts(site.shape) else {
                return Err(Error::UnknownSize { codec: codec.to_string() });
            };
            let tensor = &specs[site.index].name;
            entries.extend(parts.into_iter().map(|part| TensorEntry {
                name: part_name(tensor, part.name),
                dtype: part.dtype,
                shape: part.shape,
            }));
        }
        Ok(entries)
    }
}

/// What a codec of the leaves costs at a site, and the error that is expected of it: that of
/// plain codes of its size.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn fixed_leaf(leaf: &CodecSpec, shape: [usize; 2]) -> Result<FixedLeaf> {
    let Some(parts) = leaf.parts(shape) else {
        return Err(Error::UnknownSize { codec: leaf.to_string() });
    };
    let bytes: usize = parts.iter().map(onebase_tensor::PartSpec::size_bytes).sum();
    let bits = 8.0 * bytes as f64 / (shape[0] * shape[1]).max(1) as f64;
    let (low, part) = ((bits.floor() as usize).min(8), bits.fract());
    let high = (low + 1).min(8);
    let group_size = 128.min(shape[1].max(1));
    let [low, high] = [low, high].map(|bits| expected_error(bits, group_size));
    Ok(FixedLeaf { bits, error: low * (high / low).powf(part) })
}
