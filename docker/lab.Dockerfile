# Everything of the lab that is not the gateway: routers, relay, stand-in portal,
# client, resources and trace collector share this one image.
# Two steps, because the first is slow and never changes, and the second is fast
# and changes with every build: `--target tools` needs no binaries.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS tools
# No recommended packages: coturn would bring a mail server's worth of them.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        conntrack coturn curl iperf3 iproute2 iputils-ping jq nftables tcpdump \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
COPY lab-entrypoint /usr/local/bin/lab-entrypoint
ENTRYPOINT ["/usr/local/bin/lab-entrypoint"]

FROM tools AS lab
COPY bin/ /usr/local/bin/
