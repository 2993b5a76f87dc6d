#include "report.h"

#include <dlfcn.h>
#include <execinfo.h>

#include <cstdio>
#include <cstring>
#include <sstream>
#include <vector>

#include "machine.h"

namespace simt {

namespace {

struct Frame {
  std::string function, file;
  int line = 0;
};

struct Report {
  bool present = false;
  std::string kind, text;
  Site site = {nullptr, 0};
  uint32_t pc = 0;
  Index block = {};
  int thread = 0;
  void* stack[64];
  int stack_depth = 0;
} report;

uintptr_t library_base = 0;
std::string library_path;

// Without return type, namespaces, template arguments and parameters.
std::string bare(const std::string& name) {
  std::string text;
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    const char c = name[i];
    if (name.compare(i, 22, "(anonymous namespace):") == 0) {
      i += 22;
      continue;
    }
    if (c == '<') ++depth;
    if (depth == 0) {
      if (c == '(') break;
      text = c == ' ' || c == ':' ? "" : text + c;
    }
    if (c == '>') --depth;
  }
  return text;
}

// The inlined frames at addresses of the kernel's library, innermost first, in one call of addr2line. Each address is
// followed by address zero, whose answer `?? ??:0` ends its frames.
std::vector<std::vector<Frame>> frames_at(const std::vector<uint32_t>& addresses) {
  std::ostringstream command;
  command << "addr2line -i -f -C -e '" << library_path << "'" << std::hex;
  for (const uint32_t address : addresses) command << " 0x" << address << " 0x0";
  command << " 2>/dev/null";
  std::vector<std::vector<Frame>> frames(addresses.size());
  std::FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return frames;
  size_t at = 0;
  char function[4096], place[4096];
  while (at < frames.size() && std::fgets(function, sizeof(function), pipe) != nullptr &&
         std::fgets(place, sizeof(place), pipe) != nullptr) {
    char* colon = std::strrchr(place, ':');
    if (colon == nullptr) continue;
    Frame frame;
    frame.function = bare(std::string(function, std::strcspn(function, "\n")));
    frame.line = std::atoi(colon + 1);
    *colon = 0;
    frame.file = place;
    const bool unknown = frame.function == "??" && frame.file == "??";
    // "././csrc/..." of a compilation that mapped its own directory away
    while (frame.file.rfind("./", 0) == 0) frame.file.erase(0, 2);
    // An address of no known line also answers with `??`; it then has a frame of its own, and the zero ends it.
    if (unknown && !frames[at].empty()) {
      ++at;
    } else {
      frames[at].push_back(frame);
    }
  }
  pclose(pipe);
  return frames;
}

// The executor's headers, where intrinsics are inlined from, and torch's own explain nothing.
bool is_kernel_source(const Frame& frame) {
  return frame.line > 0 && frame.file.find("simt/include/") == std::string::npos &&
         frame.file.find("/torch/") == std::string::npos && frame.file.find("/c++/") == std::string::npos;
}

std::string place(const Frame& frame) { return frame.file + ":" + std::to_string(frame.line); }

// Those in the kernels' sources.
std::vector<Frame> kernel_sources(const std::vector<Frame>& frames) {
  std::vector<Frame> chosen;
  for (const Frame& frame : frames) {
    if (is_kernel_source(frame)) chosen.push_back(frame);
  }
  return chosen;
}

[[noreturn]] void leave(const char* kind, const std::string& text) {
  report.present = true;
  report.kind = kind;
  report.text = text;
  report.block = machine.block;
  report.thread = self().index;
  report.stack_depth = backtrace(report.stack, 64);
  Fiber::switch_to(self().fiber, machine.host);
  __builtin_unreachable();
}

}  // namespace

void violation(const char* kind, const std::string& text, uint32_t pc) {
  report.site = {nullptr, 0};
  report.pc = pc;
  leave(kind, text);
}

void violation_at(Site site, const char* kind, const std::string& text) {
  report.site = site;
  report.pc = 0;
  leave(kind, text);
}

bool violated() { return report.present; }

std::string take_report() {
  report.present = false;
  // The kernel itself, then the access, then its callers as far as they are the kernel's library.
  std::vector<uint32_t> addresses = {
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(machine.launch->kernel) - library_base)};
  if (report.pc != 0) addresses.push_back(report.pc);
  for (int i = 0; i < report.stack_depth; ++i) {
    Dl_info info = {};
    if (dladdr(report.stack[i], &info) == 0 || reinterpret_cast<uintptr_t>(info.dli_fbase) != library_base) continue;
    const uint32_t address = relative_pc(report.stack[i]);
    if (address != report.pc) addresses.push_back(address);
  }
  std::vector<std::vector<Frame>> found = frames_at(addresses);
  const std::string kernel = found[0].empty() ? "an unknown kernel" : found[0].back().function;
  std::vector<Frame> frames;
  for (size_t i = 1; i < found.size(); ++i) {
    for (const Frame& frame : kernel_sources(found[i])) frames.push_back(frame);
  }
  std::ostringstream text;
  text << machine.launch->operation << ": " << report.kind << " in " << kernel << ", " << describe_block(report.block)
       << ", thread " << report.thread;
  size_t caller = 0;
  if (report.site.file != nullptr) {
    text << ", at " << describe(report.site);
    if (!frames.empty() && place(frames[0]) == describe(report.site)) caller = 1;
  } else if (!frames.empty()) {
    text << ", at " << place(frames[0]) << " (" << frames[0].function << ")";
    caller = 1;
  }
  text << ": " << report.text;
  for (; caller < frames.size(); ++caller) {
    text << "\n  called from " << place(frames[caller]) << " (" << frames[caller].function << ")";
  }
  text << "\n  seed " << machine.seed;
  return text.str();
}

std::string describe(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string describe_pc(uint32_t pc) {
  const std::vector<Frame> frames = kernel_sources(frames_at({pc})[0]);
  return frames.empty() ? "an unknown line" : place(frames[0]);
}

std::string describe_block(const Index& block) {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
}

void set_kernel_library(const void* kernel) {
  Dl_info info = {};
  if (dladdr(kernel, &info) == 0) return;
  library_base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  library_path = info.dli_fname;
  static const int loaded = [] {
    void* stack[1];
    return backtrace(stack, 1);  // its first call loads a library, which a fiber's stack may be too small for
  }();
  (void)loaded;
}

uintptr_t kernel_library_base() { return library_base; }
const char* kernel_library_path() { return library_path.c_str(); }

}  // namespace simt
