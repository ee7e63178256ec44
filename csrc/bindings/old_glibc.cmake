# Modules that run wherever glibc is at least GUT_FAST_GLIBC, such as 2.28, however new the one here is. GCC compiles as
# ever. zig, which knows the symbols of every glibc, links; GCC's own libraries, but for the unwinder, go into the module
# and stay hidden in it: PyTorch brings another copy of them into the process. `pip install ziglang` brings zig.
find_program(zig NAMES zig python-zig REQUIRED)
foreach(library libstdc++.a libgcc.a libgcc_s.so.1)
  execute_process(
    COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library}
    OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(APPEND gcc_libraries " ${path}")
endforeach()
set(exports ${PROJECT_BINARY_DIR}/generated/exports.map)
file(WRITE ${exports} "{ global: PyInit_*; local: *; };\n")
string(JOIN " " CMAKE_CXX_CREATE_SHARED_MODULE
  "${zig} cc -target ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu.${GUT_FAST_GLIBC} -nodefaultlibs -shared -o <TARGET> <OBJECTS>"
  "<LINK_LIBRARIES> ${gcc_libraries} -lm -lpthread -lc -Wl,--gc-sections -Wl,--version-script=${exports}")
target_sources(_core PRIVATE csrc/bindings/old_glibc.cpp)
