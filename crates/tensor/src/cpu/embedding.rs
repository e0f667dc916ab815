//! Looking up rows of a table, and adding to them.

/// A row of the table, when the index falls into it.
fn place(index: u32, offset: usize, rows: usize) -> Option<usize> {
    (index as usize).checked_sub(offset).filter(|row| *row < rows)
}

pub(super) fn embed(
    width: usize,
    indices: &[u32],
    offset: usize,
    table: &[f32],
    out: &mut [f32],
    accumulate: bool,
) {
    assert_eq!(out.len(), indices.len() * width, "embed");
    let rows = table.len() / width;
    for (out, index) in out.chunks_exact_mut(width).zip(indices) {
        match place(*index, offset, rows) {
            Some(row) => {
                let from = &table[row * width..(row + 1) * width];
                if accumulate {
                    out.iter_mut().zip(from).for_each(|(o, f)| *o += f);
                } else {
                    out.copy_from_slice(from);
                }
            }
            None if !accumulate => out.fill(0.0),
            None => {}
        }
    }
}

/// One thread, in the order of rows: the sum is the same in every run, and the traffic is that of
/// one pass over `dy`.
pub(super) fn embed_grad(
    width: usize,
    indices: &[u32],
    offset: usize,
    dy: &[f32],
    dtable: &mut [f32],
) {
    assert_eq!(dy.len(), indices.len() * width, "embed gradient");
    let rows = dtable.len() / width;
    for (dy, index) in dy.chunks_exact(width).zip(indices) {
        if let Some(row) = place(*index, offset, rows) {
            let to = &mut dtable[row * width..(row + 1) * width];
            to.iter_mut().zip(dy).for_each(|(t, d)| *t += d);
        }
    }
}
