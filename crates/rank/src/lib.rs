//! Placeholder until its first file is written.
