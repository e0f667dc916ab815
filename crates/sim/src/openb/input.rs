//! The trace files: nodes and pods as comma-separated text, checked row by row.

use std::collections::BTreeMap;

/// The most GPUs that a node may have and a pod may ask for.
pub const GPUS_MAX: usize = 8;
/// The parts that a GPU is divided into.
pub const WHOLE: u16 = 1000;
/// The most GPU models that a node file may name.
pub const MODELS_MAX: usize = 32;

/// Where a file is wrong, and what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: expected {expected}, found {found:?}")]
pub struct InputError {
    /// The file, as the caller names it.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The character within the line, from 1.
    pub column: usize,
    /// What was expected there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

/// A node as the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// Processor time, in thousandths of a core.
    pub cpu_milli: i32,
    /// Main memory, in MiB.
    pub memory_mib: i32,
    /// Number of GPUs.
    pub gpus: u8,
    /// Its GPU model's place in [`Trace::models`].
    pub model: u8,
}

/// What a pod asks for, except memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// Processor time, in thousandths of a core.
    pub cpu_milli: i32,
    /// Thousandths of each of its GPUs.
    pub gpu_milli: u16,
    /// Number of GPUs.
    pub gpus: u8,
    /// The models that it accepts, one bit each; all bits when it accepts any.
    pub models: u32,
}

impl Shape {
    /// Returns the thousandths of a GPU that it asks for in all.
    #[must_use]
    pub fn gpu_total(&self) -> i64 {
        i64::from(self.gpus) * i64::from(self.gpu_milli)
    }
}

/// A pod as the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRow {
    /// Its name.
    pub name: String,
    /// Its place in [`Trace::shapes`].
    pub shape: usize,
    /// Main memory, in MiB.
    pub memory_mib: i32,
}

/// A node file and a pod file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The nodes, by name.
    pub nodes: Vec<NodeRow>,
    /// The GPU models of the nodes.
    pub models: Vec<String>,
    /// The pods, by name.
    pub pods: Vec<PodRow>,
    /// The distinct things that pods ask for.
    pub shapes: Vec<Shape>,
}

impl Trace {
    /// Reads a trace. The names of the files are used in errors only.
    ///
    /// # Errors
    /// [`InputError`] for the first row that is malformed.
    pub fn read(nodes: (&str, &str), pods: (&str, &str)) -> Result<Self, InputError> {
        let mut models = Vec::new();
        let nodes = read_nodes(&Table::open(nodes.0, nodes.1)?, &mut models)?;
        let mut trace = Self { nodes, models, pods: Vec::new(), shapes: Vec::new() };
        read_pods(&Table::open(pods.0, pods.1)?, &mut trace)?;
        trace.nodes.sort_by(|a, b| a.name.cmp(&b.name));
        trace.pods.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(trace)
    }

    /// Returns the thousandths of a GPU that the nodes have in all.
    #[must_use]
    pub fn gpu_capacity(&self) -> i64 {
        self.nodes.iter().map(|n| i64::from(n.gpus) * i64::from(WHOLE)).sum()
    }

    /// Returns the pods that no node could hold if it were empty.
    pub fn impossible(&self) -> impl Iterator<Item = &PodRow> {
        self.pods.iter().filter(|pod| {
            let shape = &self.shapes[pod.shape];
            !self.nodes.iter().any(|node| {
                node.cpu_milli >= shape.cpu_milli
                    && node.memory_mib >= pod.memory_mib
                    && node.gpus >= shape.gpus
                    && (shape.gpus == 0 || shape.models & (1 << node.model) != 0)
            })
        })
    }
}

/// A file with its header read.
struct Table<'a> {
    file: &'a str,
    columns: BTreeMap<&'a str, usize>,
    rows: Vec<(usize, &'a str)>,
}

/// One cell, with its place.
struct Cell<'a> {
    file: &'a str,
    line: usize,
    column: usize,
    text: &'a str,
}

impl<'a> Table<'a> {
    fn open(file: &'a str, text: &'a str) -> Result<Self, InputError> {
        let mut lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let Some((_, header)) = lines.next() else {
            let place = Cell { file, line: 1, column: 1, text: "" };
            return Err(place.wrong("a header line with column names"));
        };
        let header = header.trim_start_matches('\u{feff}');
        let columns = header.split(',').enumerate().map(|(at, name)| (name.trim(), at)).collect();
        Ok(Self { file, columns, rows: lines.collect() })
    }

    fn column(&self, name: &str) -> Result<usize, InputError> {
        self.columns.get(name).copied().ok_or_else(|| {
            let place = Cell { file: self.file, line: 1, column: 1, text: "" };
            place.wrong(format!("a column named {name}"))
        })
    }

    fn cell(&self, row: (usize, &'a str), at: usize) -> Result<Cell<'a>, InputError> {
        let (line, text) = row;
        let mut start = 0;
        for (place, cell) in text.split(',').enumerate() {
            if place == at {
                let column = text[..start].chars().count() + 1;
                return Ok(Cell { file: self.file, line, column, text: cell.trim() });
            }
            start += cell.len() + 1;
        }
        let end = Cell { file: self.file, line, column: text.chars().count() + 1, text: "" };
        let columns = self.columns.len();
        Err(end.wrong(format!("{columns} columns, as in the header")))
    }
}

impl Cell<'_> {
    fn wrong(&self, expected: impl Into<String>) -> InputError {
        InputError {
            file: self.file.to_owned(),
            line: self.line,
            column: self.column,
            expected: expected.into(),
            found: self.text.to_owned(),
        }
    }

    fn number(&self, what: &str, max: i32) -> Result<i32, InputError> {
        match self.text.parse::<i32>() {
            Ok(number) if (0..=max).contains(&number) => Ok(number),
            _ => Err(self.wrong(format!("{what}, a whole number from 0 to {max}"))),
        }
    }

    fn name(&self) -> Result<String, InputError> {
        if self.text.is_empty() { Err(self.wrong("a name")) } else { Ok(self.text.to_owned()) }
    }
}

/// A bound on cores and memory: a million cores, a pebibyte.
const AMOUNT_MAX: i32 = 1_000_000_000;

fn read_nodes(table: &Table<'_>, models: &mut Vec<String>) -> Result<Vec<NodeRow>, InputError> {
    let name = table.column("sn").or_else(|_| table.column("name"))?;
    let cpu = table.column("cpu_milli")?;
    let memory = table.column("memory_mib")?;
    let gpus = table.column("gpu")?;
    let model = table.column("model")?;
    let mut nodes = Vec::with_capacity(table.rows.len());
    for &row in &table.rows {
        let cell = table.cell(row, model)?;
        let known = models.iter().position(|known| known == cell.text);
        let model = known.unwrap_or(models.len());
        if known.is_none() {
            if models.len() == MODELS_MAX {
                return Err(cell.wrong(format!("at most {MODELS_MAX} GPU models")));
            }
            models.push(cell.text.to_owned());
        }
        nodes.push(NodeRow {
            name: table.cell(row, name)?.name()?,
            cpu_milli: table.cell(row, cpu)?.number("thousandths of a core", AMOUNT_MAX)?,
            memory_mib: table.cell(row, memory)?.number("memory in MiB", AMOUNT_MAX)?,
            gpus: table.cell(row, gpus)?.number("GPUs", GPUS_MAX as i32)? as u8,
            model: model as u8,
        });
    }
    Ok(nodes)
}

fn read_pods(table: &Table<'_>, trace: &mut Trace) -> Result<(), InputError> {
    let name = table.column("name")?;
    let cpu = table.column("cpu_milli")?;
    let memory = table.column("memory_mib")?;
    let gpus = table.column("num_gpu")?;
    let milli = table.column("gpu_milli")?;
    let spec = table.column("gpu_spec").ok();
    let mut known: BTreeMap<Shape, usize> = BTreeMap::new();
    for &row in &table.rows {
        let models = match spec {
            Some(at) => accepted(table.cell(row, at)?.text, &trace.models),
            None => u32::MAX,
        };
        let gpus = table.cell(row, gpus)?.number("GPUs", GPUS_MAX as i32)? as u8;
        let cell = table.cell(row, milli)?;
        let gpu_milli = cell.number("thousandths of a GPU", i32::from(WHOLE))? as u16;
        if (gpus == 0) != (gpu_milli == 0) {
            return Err(cell.wrong("0 exactly when num_gpu is 0"));
        }
        let shape = Shape {
            cpu_milli: table.cell(row, cpu)?.number("thousandths of a core", AMOUNT_MAX)?,
            gpu_milli,
            gpus,
            models,
        };
        let shapes = &mut trace.shapes;
        let shape = *known.entry(shape).or_insert_with(|| {
            shapes.push(shape);
            shapes.len() - 1
        });
        trace.pods.push(PodRow {
            name: table.cell(row, name)?.name()?,
            shape,
            memory_mib: table.cell(row, memory)?.number("memory in MiB", AMOUNT_MAX)?,
        });
    }
    Ok(())
}

/// Returns the models that a pod accepts: `A|B` is either, an empty list is any.
fn accepted(spec: &str, models: &[String]) -> u32 {
    let mut named = spec.split('|').map(str::trim).filter(|name| !name.is_empty()).peekable();
    if named.peek().is_none() {
        return u32::MAX;
    }
    named
        .filter_map(|name| models.iter().position(|model| model == name))
        .fold(0, |mask, at| mask | (1 << at))
}
