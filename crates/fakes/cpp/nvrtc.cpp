// A fake NVRTC: "compiles" a kernel's source for the emulated device, by giving it, with emulated.h
// before it and an entry for each kernel behind it, to the C++ compiler. What nvrtcGetCUBIN returns is
// a shared object. Test equipment.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <fstream>
#include <regex>
#include <sstream>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum { SUCCESS = 0, OUT_OF_MEMORY = 1, INVALID_INPUT = 3, INVALID_OPTION = 5, COMPILATION = 6 };

struct Program {
    std::string source, log, image;
};

static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

EXPORT int nvrtcVersion(int* major, int* minor) {
    *major = 13, *minor = 0;
    return SUCCESS;
}
EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char*, int headers, const char* const*,
                              const char* const*) {
    if (headers != 0) return INVALID_INPUT;
    *program = new Program{source, "", ""};
    return SUCCESS;
}
EXPORT int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}
EXPORT int nvrtcCompileProgram(Program* p, int count, const char* const* options) {
    for (int i = 0; i < count; i++) {
        std::string o = options[i];
        if (o.rfind("--gpu-architecture=sm_", 0) != 0 && o != "--std=c++17") {
            p->log = "unknown option " + o;
            return INVALID_OPTION;
        }
    }
    char folder[] = "/tmp/drumline-nvrtc-XXXXXX";
    if (!mkdtemp(folder)) return OUT_OF_MEMORY;
    std::string base = folder, source = base + "/kernel.cpp", object = base + "/kernel.so", log = base + "/log";
    {
        std::ofstream file(source);
        file << "#include \"" EMULATED_H "\"\n#line 1\n" << p->source << "\n";
        // As a compiler would, by what is left after macros: ATTENTION(8) and the like make entries too.
    }
    std::string preprocessed = base + "/kernel.i", compiler = EMULATED_COMPILER;
    int code = system((compiler + " -std=c++17 -E -P -D__global__=EMULATED_GLOBAL -DEMULATED_SCAN -o " + preprocessed + " " +
                       source + " 2>" + log).c_str());
    if (code == 0) {
        std::ofstream file(source, std::ios::app);
        std::string text = contents(preprocessed);
        std::regex kernel("EMULATED_GLOBAL\\s+void\\s+(?:__attribute__\\s*\\(\\(.*?\\)\\)\\s*)?(\\w+)\\s*\\(");
        for (std::sregex_iterator i(text.begin(), text.end(), kernel), end; i != end; ++i)
            file << "EMULATED_ENTRY(" << (*i)[1] << ")\n";
        file.close();
        code = system((compiler + " -std=c++17 -O1 -shared -fPIC -fvisibility=hidden -w -o " + object + " " + source +
                       " 2>" + log).c_str());
    }
    p->log = contents(log);
    if (code == 0) p->image = contents(object);
    for (auto path : {source, object, log, preprocessed}) unlink(path.c_str());
    rmdir(folder);
    return code == 0 ? SUCCESS : COMPILATION;
}
EXPORT int nvrtcGetProgramLogSize(Program* p, size_t* bytes) {
    *bytes = p->log.size() + 1;
    return SUCCESS;
}
EXPORT int nvrtcGetProgramLog(Program* p, char* to) {
    memcpy(to, p->log.c_str(), p->log.size() + 1);
    return SUCCESS;
}
EXPORT int nvrtcGetCUBINSize(Program* p, size_t* bytes) {
    *bytes = p->image.size();
    return SUCCESS;
}
EXPORT int nvrtcGetCUBIN(Program* p, char* to) {
    memcpy(to, p->image.data(), p->image.size());
    return SUCCESS;
}
