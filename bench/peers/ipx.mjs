// ipx on Node's own server: GET /w_300,f_webp,q_82/3m.jpg
import http from 'node:http';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const entry = path.join(process.cwd(), 'node_modules/ipx/dist/index.mjs');
const { createIPX, createIPXNodeServer, ipxFSStorage } = await import(pathToFileURL(entry).href);
const ipx = createIPX({ storage: ipxFSStorage({ dir: process.env.PICTURES }) });
http.createServer(createIPXNodeServer(ipx)).listen(Number(process.env.PORT), '127.0.0.1');
