//! What is urgent does not wait for what is not.
