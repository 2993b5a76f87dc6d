#include "shared.h"

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "report.h"

namespace simt {

namespace {

constexpr size_t kArenaBytes = 228 * 1024;
constexpr size_t kAroundArena = 1 << 20;  // reserved without access: overruns are known for what they are

struct Segment {
  uintptr_t begin, end;
};

// What there is to know of one library of kernels.
struct Library {
  std::vector<SharedPiece> variables;  // by address
  Segment data = {0, 0};
  std::vector<Segment> constants;
};

struct Arena {
  char* memory = nullptr;
  SharedPiece piece;
} arena;

Library* library = nullptr;
const SharedPiece* last_variable = nullptr;

void* reserve(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return memory;
}

void prepare_arena() {
  if (arena.memory != nullptr) return;
  char* around = static_cast<char*>(reserve(2 * kAroundArena, PROT_NONE));
  arena.memory = around + kAroundArena;
  mprotect(arena.memory, kArenaBytes, PROT_READ | PROT_WRITE);
  arena.piece.cells = static_cast<Cell*>(reserve(kArenaBytes * sizeof(Cell), PROT_READ | PROT_WRITE));
  arena.piece.name = "dynamic shared memory";
}

std::string demangled(const char* symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = text == nullptr ? symbol : text;
  std::free(text);
  const size_t colon = name.rfind("::");
  return colon == std::string::npos ? name : name.substr(colon + 2);
}

// The variables in the library's writable data, from the symbol table of its file.
void read_variables(Library& of, uintptr_t base) {
  const int file = open(kernel_library_path(), O_RDONLY);
  struct stat status = {};
  if (file < 0 || fstat(file, &status) != 0) abort();
  const auto bytes = static_cast<size_t>(status.st_size);
  auto* image = static_cast<char*>(mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0));
  close(file);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = image + sections[sections[s].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof(*symbols); ++i) {
      const auto& symbol = symbols[i];
      const int type = ELF64_ST_TYPE(symbol.st_info);
      const uintptr_t address = base + symbol.st_value;
      if (type != STT_OBJECT || symbol.st_size == 0) continue;
      if (address < of.data.begin || address + symbol.st_size > of.data.end) continue;
      of.variables.push_back({address, address + symbol.st_size, nullptr, demangled(names + symbol.st_name)});
    }
  }
  munmap(image, bytes);
  std::sort(of.variables.begin(), of.variables.end(), [](const SharedPiece& a, const SharedPiece& b) {
    return a.begin < b.begin;
  });
}

int read_segments(dl_phdr_info* info, size_t, void* into) {
  if (info->dlpi_addr != kernel_library_base()) return 0;
  auto& of = *static_cast<Library*>(into);
  Segment fixed_up = {0, 0};  // constants with addresses in them, writable only while the library is loaded
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
    if (header.p_type == PT_GNU_RELRO) fixed_up = {begin, end};
    if (header.p_type != PT_LOAD) continue;
    if (header.p_flags & PF_W) {
      of.data = {begin, end};
    } else {
      of.constants.push_back({begin, end});
    }
  }
  if (fixed_up.end > of.data.begin) {
    of.constants.push_back(fixed_up);
    of.data.begin = fixed_up.end;
  }
  return 1;
}

Library& known_library() {
  static std::map<uintptr_t, Library> libraries;
  const uintptr_t base = kernel_library_base();
  const auto [entry, fresh] = libraries.try_emplace(base);
  Library& of = entry->second;
  if (!fresh) return of;
  dl_iterate_phdr(read_segments, &of);
  read_variables(of, base);
  const size_t bytes = of.data.end - of.data.begin;
  auto* cells = static_cast<Cell*>(reserve(bytes * sizeof(Cell) + 1, PROT_READ | PROT_WRITE));
  for (SharedPiece& variable : of.variables) variable.cells = cells + (variable.begin - of.data.begin);
  return of;
}

}  // namespace

bool near_shared(uintptr_t address) {
  const auto middle = reinterpret_cast<uintptr_t>(arena.memory);
  return address - (middle - kAroundArena) < 2 * kAroundArena ||
         address - library->data.begin < library->data.end - library->data.begin;
}

const SharedPiece* shared_piece(uintptr_t address) {
  const auto middle = reinterpret_cast<uintptr_t>(arena.memory);
  if (address - (middle - kAroundArena) < 2 * kAroundArena) return &arena.piece;
  if (last_variable != nullptr && address - last_variable->begin < last_variable->end - last_variable->begin) {
    return last_variable;
  }
  const auto& variables = library->variables;
  const auto after = std::upper_bound(
      variables.begin(), variables.end(), address,
      [](uintptr_t a, const SharedPiece& piece) { return a < piece.begin; });
  if (variables.empty()) return nullptr;
  // The one below; between two, the nearer.
  const bool below = after != variables.begin();
  const bool above = after != variables.end();
  const bool nearer_below = below && (!above || address - (after - 1)->end <= after->begin - address);
  last_variable = below && (address < (after - 1)->end || nearer_below) ? &*(after - 1) : &*after;
  return last_variable;
}

bool is_constant(uintptr_t address, size_t bytes) {
  for (const Segment& segment : library->constants) {
    if (address >= segment.begin && address < segment.end && bytes <= segment.end - address) return true;
  }
  return false;
}

void set_shared(const Launch& launch) {
  prepare_arena();
  arena.piece.begin = reinterpret_cast<uintptr_t>(arena.memory);
  arena.piece.end = arena.piece.begin + launch.dynamic_shared_bytes;
  library = &known_library();
  last_variable = nullptr;
}

void begin_block_shared() {
  // A NaN in every type. Reading it is a violation anyway; this is for what reads without being seen.
  std::memset(arena.memory, 0xFF, arena.piece.end - arena.piece.begin);
}

void* dynamic_shared() { return arena.memory; }

}  // namespace simt
