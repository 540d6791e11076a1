//! nftables through `nft -f -`.
