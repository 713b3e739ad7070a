//! Inputs as they are kept: a line of hexadecimal digits each, an empty line for an empty one.

/// The inputs of a file. What is no byte is left out.
pub(crate) fn inputs(text: &str) -> impl Iterator<Item = Vec<u8>> {
    text.lines().map(|line| {
        let digits: Vec<u32> = line.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.chunks_exact(2).filter_map(|pair| u8::try_from(pair[0] * 16 + pair[1]).ok()).collect()
    })
}
