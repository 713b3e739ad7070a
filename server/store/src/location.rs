//! Where a store is: a folder, or a bucket.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, fs};

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{Certificate, ClientOptions, RetryConfig};

use crate::StoreError;
use crate::bucket::Bucket;
use crate::local::LocalFolder;

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A folder of this machine, by its absolute path.
    Folder(PathBuf),
    /// A bucket of a store that speaks S3, and a prefix in it.
    S3 {
        /// The bucket.
        bucket: String,
        /// The prefix, without slashes around it; empty for none.
        prefix: String,
        /// How to reach it.
        options: S3Options,
    },
}

/// How to reach a bucket. What is not given comes from the environment, as for every S3 client: `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`, a web identity, or the machine's role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct S3Options {
    /// The server, where it is not Amazon's: `https://host:port`.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Allow an endpoint without TLS. Device state and keys are then readable by whoever sees the wire.
    pub allow_http: bool,
    /// Authorities to trust beside the system's, a PEM file.
    pub ca: Option<PathBuf>,
    /// A file with `AWS_ACCESS_KEY_ID=…` and `AWS_SECRET_ACCESS_KEY=…`, a line each, as a mounted secret has it.
    pub credentials: Option<PathBuf>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::S3 { bucket, prefix, .. } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix, .. } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

impl FromStr for Location {
    type Err = StoreError;

    /// An absolute path, `file:///path`, or `s3://bucket/prefix`.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let refused = |problem: &str| StoreError::Location { location: text.into(), problem: problem.into() };
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let is_bucket = (3..=63).contains(&bucket.len())
                && bucket.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'));
            if !is_bucket {
                return Err(refused(
                    "a bucket's name is 3 to 63 of a-z, 0-9, hyphen and dot: s3://bucket/prefix",
                ));
            }
            let prefix = prefix.trim_matches('/');
            if Path::parse(prefix).is_err() {
                return Err(refused("the prefix holds what no object's name may hold"));
            }
            return Ok(Self::S3 {
                bucket: bucket.into(),
                prefix: prefix.into(),
                options: S3Options::default(),
            });
        }
        let path = text.strip_prefix("file://").unwrap_or(text);
        if path.contains("://") {
            return Err(refused("it is neither an absolute path nor s3://bucket/prefix"));
        }
        if !path.starts_with('/') {
            return Err(refused("the path is not absolute; write it from the root, or s3://bucket/prefix"));
        }
        Ok(Self::Folder(path.into()))
    }
}

impl Location {
    pub(crate) async fn bucket(&self, may_make: bool) -> Result<Bucket, StoreError> {
        match self {
            Self::Folder(path) => Ok(Bucket::local(LocalFolder::open(path.clone(), may_make).await?)),
            Self::S3 { bucket, prefix, options } => {
                let unusable = |problem: String| StoreError::Location { location: self.to_string(), problem };
                let builder = options.builder(bucket).map_err(unusable)?;
                let objects = builder.build().map_err(|error| unusable(error.to_string()))?;
                let objects: Arc<dyn object_store::ObjectStore> = if prefix.is_empty() {
                    Arc::new(objects)
                } else {
                    Arc::new(PrefixStore::new(objects, Path::from(prefix.as_str())))
                };
                Ok(Bucket::remote(&self.to_string(), objects))
            }
        }
    }
}

impl S3Options {
    fn builder(&self, bucket: &str) -> Result<AmazonS3Builder, String> {
        let mut client = ClientOptions::new()
            .with_allow_http(self.allow_http)
            .with_connect_timeout(Duration::from_secs(10))
            .with_timeout(Duration::from_mins(1));
        if let Some(path) = &self.ca {
            let pem = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let found =
                Certificate::from_pem_bundle(&pem).map_err(|error| format!("{}: {error}", path.display()))?;
            if found.is_empty() {
                return Err(format!("{} holds no certificate", path.display()));
            }
            client = found.into_iter().fold(client, ClientOptions::with_root_certificate);
        }
        // Enough for a store that restarts, and short enough that a save does not hang on one that is gone.
        let retry =
            RetryConfig { max_retries: 6, retry_timeout: Duration::from_secs(40), ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_retry(retry)
            .with_conditional_put(S3ConditionalPut::ETagMatch);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        if let Some(path) = &self.credentials {
            let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let value = |name: &str| {
                let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
                line.map(str::trim).ok_or_else(|| format!("{} has no line {name}=…", path.display()))
            };
            builder = builder
                .with_access_key_id(value("AWS_ACCESS_KEY_ID")?)
                .with_secret_access_key(value("AWS_SECRET_ACCESS_KEY")?);
            if let Ok(token) = value("AWS_SESSION_TOKEN") {
                builder = builder.with_token(token);
            }
        }
        Ok(builder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read_and_shown() {
        for text in ["/var/lib/x", "s3://bucket", "s3://bucket/some/prefix"] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        assert_eq!("file:///a".parse::<Location>().unwrap(), Location::Folder("/a".into()));
        for text in ["", "a/b", "gs://bucket", "s3://", "s3://Bucket", "s3://b/x", "s3://bucket/../x"] {
            let refused = text.parse::<Location>().unwrap_err().to_string();
            assert!(refused.contains("is no place for a store"), "{text}: {refused}");
        }
    }
}
