"""Takes plaintext connections on a free port, which it prints, and forwards them over mutual TLS.

    tls-forward.py PORT CA CERTIFICATE KEY
"""

import asyncio
import ssl
import sys


async def copy(reader, writer):
    """Passes on what comes until it ends; what the other side does not take any more is dropped, so
    that a client can still read what it was sent before the end."""
    open_ = True
    while True:
        try:
            data = await reader.read(65536)
        except OSError:
            data = b""
        if not data:
            break
        if open_:
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                open_ = False
    if writer.can_write_eof():
        try:
            writer.write_eof()
        except OSError:
            pass
    else:
        writer.close()


async def main():
    port, ca, certificate, key = sys.argv[1:]
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = True
    context.load_cert_chain(certificate, key)

    async def forward(reader, writer):
        try:
            far = await asyncio.open_connection(
                "127.0.0.1", int(port), ssl=context, server_hostname="localhost"
            )
        except OSError as error:
            print(error, file=sys.stderr)
            writer.close()
            return
        await asyncio.gather(copy(reader, far[1]), copy(far[0], writer))
        writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
