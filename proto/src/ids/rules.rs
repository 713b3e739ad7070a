//! What the texts of ids may be. Each rule says the first thing that is wrong, as the end of a sentence.

/// Quotes a text for an error: control characters are escaped, and a long text is cut.
pub(crate) fn quoted(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut shown: String = text.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        shown.push('…');
    }
    format!("\"{shown}\"")
}

/// A run of lowercase letters, digits and some other characters that begins and ends with a letter or digit.
pub(super) struct Label {
    /// The other characters.
    pub(super) others: &'static str,
    /// The most bytes.
    pub(super) max_bytes: usize,
}

pub(super) fn label(text: &str, rule: &Label) -> Result<(), String> {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if text.len() > rule.max_bytes {
        return Err(format!("it has {} bytes, and at most {} are allowed", text.len(), rule.max_bytes));
    }
    if let Some((at, found)) =
        text.char_indices().find(|(_, c)| !alphanumeric(*c) && !rule.others.contains(*c))
    {
        return Err(format!(
            "{found:?} at byte {at} is not allowed; allowed are a-z, 0-9 and any of `{}`",
            rule.others
        ));
    }
    if !text.starts_with(alphanumeric) || !text.ends_with(alphanumeric) {
        return Err("it must begin and end with a letter or digit".into());
    }
    Ok(())
}

pub(super) fn resource(text: &str, collection: &str, rule: &Label) -> Result<(), String> {
    match text.strip_prefix(collection) {
        Some(id) => label(id, rule).map_err(|problem| format!("after `{collection}`, {problem}")),
        None if text.is_empty() => Err("it is empty".into()),
        None => Err(format!("it does not begin with `{collection}`")),
    }
}

pub(super) fn hex(text: &str, digits: usize) -> Result<(), String> {
    if let Some((at, found)) = text.char_indices().find(|(_, c)| !c.is_ascii_hexdigit()) {
        return Err(format!("{found:?} at byte {at} is not a hexadecimal digit"));
    }
    if text.len() != digits {
        return Err(format!("it has {} digits", text.len()));
    }
    Ok(())
}

pub(super) fn uuid(text: &str) -> Result<(), String> {
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
    if text.len() != 36 {
        return Err(format!("it has {} bytes, and a UUID has 36", text.len()));
    }
    let groups: Vec<&str> = text.split('-').collect();
    if groups.len() != GROUPS.len() {
        return Err(format!("it has {} groups, and a UUID has 5", groups.len()));
    }
    for (group, digits) in groups.iter().zip(GROUPS) {
        hex(group, digits)
            .map_err(|problem| format!("in the group \"{group}\", {problem}; {digits} belong there"))?;
    }
    Ok(())
}

pub(super) fn pod(text: &str) -> Result<(), String> {
    const NAMESPACE: Label = Label { others: "-", max_bytes: 63 };
    const PART: Label = Label { others: "-", max_bytes: 253 };
    let Some((namespace, name)) = text.split_once('/') else {
        return Err("it has no slash".into());
    };
    label(namespace, &NAMESPACE).map_err(|problem| format!("in the namespace, {problem}"))?;
    if name.len() > 253 {
        return Err(format!("its name has {} bytes, and at most 253 are allowed", name.len()));
    }
    for part in name.split('.') {
        label(part, &PART)
            .map_err(|problem| format!("in the part {} of the name, {problem}", quoted(part)))?;
    }
    Ok(())
}
