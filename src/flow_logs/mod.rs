//! What flow logs are uploaded with (data-path spec §8.1). Not complete: no token is accepted yet,
//! so flows are accounted for and go nowhere.

/// What the portal lets us upload with.
#[derive(Debug)]
pub struct Authorization(std::convert::Infallible);

impl Authorization {
    /// Refuses every token, for the time being.
    ///
    /// # Errors
    /// Always.
    pub fn parse(_token: &str) -> Result<Self, std::fmt::Error> {
        Err(std::fmt::Error)
    }
}
