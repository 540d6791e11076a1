//! The node's bridge, veths, routes, sysctls and firewall.
